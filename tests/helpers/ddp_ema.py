"""Checks that two ranks under DDP, with different data, have the same, correct average:

composer -n 2 -m tests.helpers.ddp_ema
"""

import torch
import torch.distributed
from composer import Trainer
from composer.utils import dist
from torch.utils.data import DataLoader

from sit_composer.algorithms.ema import EMA
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.helpers.averages import DECAY, History, closed_form
from tests.helpers.networks import SPEC, batch, small_network

torch.set_num_threads(1)
dist.initialize_dist("cpu")
data = batch(32)
samples = [{name: column[i] for name, column in data.items()} for i in range(32)]
loader = DataLoader(samples, batch_size=4, sampler=dist.get_sampler(samples))
model = ComposerSiT(small_network(), Transport(), SPEC)
ema, history = EMA(DECAY), History()
trainer = Trainer(
    model=model, train_dataloader=loader, optimizers=torch.optim.AdamW(model.network.parameters(), lr=1e-2), seed=0,
    algorithms=[ema], callbacks=[ema.weights, history], max_duration="4ba", progress_bar=False, precision="fp32",
)  # fmt: skip
trainer.fit()

for name, expected in closed_form(history).items():
    torch.testing.assert_close(ema.weights.params[name].double(), expected, rtol=1e-5, atol=1e-7)
flat = torch.cat([average.flatten() for average in ema.weights.params.values()])
both = [torch.empty_like(flat) for _ in range(2)]
torch.distributed.all_gather(both, flat)
assert torch.equal(both[0], both[1])
weights = torch.cat([w.flatten() for w in history.weights[-1].values()])
assert not torch.equal(flat, weights)
print(f"both ranks agree to the bit on {len(flat)} averaged weights")
trainer.close()
