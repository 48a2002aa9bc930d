"""Makes sra.json: what the code of SRA gives for a network and a teacher of ours.

    python -m tests.reference.sra SRA [--out FOLDER]

SRA is a checkout of vvvvvjdy/SRA; timm must be installed. Their time runs from data to noise: their networks get what
is left to 1, and give the negative. Noise and times are the same as ours, and so are the labels that are dropped.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sit_composer import randomness
from sit_composer.algorithms.ema import EMAWeights
from sit_composer.algorithms.sra import SRA
from sit_composer.config.schema import AlignmentConfig
from sit_composer.sit import SiT
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.helpers.networks import SPEC, batch
from tests.reference.blocks import fill

SIZES = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 10, "class_dropout_prob": 0.5}
BLOCK, TEACHER_BLOCK, OFFSET = 1, 3, 0.2
HEAD = {"ap_head.linear1": "projector.0", "ap_head.linear2": "projector.2"}  # theirs -> ours


def filled(name: str, p: Tensor, of: str = "") -> Tensor:
    """A trained tensor's values, by its name; of the teacher with ``of``."""
    return fill(of + name, p.shape)


def ours() -> ComposerSiT:
    """The network, whose average has other weights."""
    network, transport, weights = SiT(**SIZES, learn_sigma=False), Transport(), EMAWeights()
    config = AlignmentConfig("sra", BLOCK, teacher_block=TEACHER_BLOCK, time_offset=OFFSET)
    model = ComposerSiT(network, transport, SPEC, alignment=SRA(config, network, transport, weights))
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(filled(name.removeprefix("network."), p))
    for name, p in network.named_parameters():
        if p.requires_grad:
            weights.params[f"network.{name}"] = filled(name, p, "teacher.")
    return model


def norms(model: nn.Module, names: dict[str, str]) -> dict[str, float]:
    """The norm of each trained parameter's gradient, by our name for it."""
    found = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    for theirs, renamed in names.items():
        found = {name.replace(theirs, renamed): norm for name, norm in found.items()}
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sra", type=Path, help="a checkout of vvvvvjdy/SRA")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder to write to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(args.sra / "SiT-SRA"))
    from loss import SRALoss
    from models.sit import SiT as TheirSiT

    class Reversed(TheirSiT):
        def forward(self, x, t, y, ad):
            field, tokens, labels = super().forward(x, 1 - t, y, ad)
            return -field, tokens, labels

    def network(of: str) -> nn.Module:
        made = Reversed(decoder_hidden_size=SIZES["hidden_size"], use_cfg=True, fused_attn=True, qk_norm=False, **SIZES)
        for name, p in made.named_parameters():
            if p.requires_grad:
                for theirs, renamed in HEAD.items():
                    name = name.replace(theirs, renamed)
                p.data.copy_(filled(name, p, of))
        return made

    data = batch()
    keys, student, teacher = data["key"], network("").train(), network("teacher.").requires_grad_(False).eval()
    x1, x0 = ours().latents(data, keys), randomness.normal(keys, randomness.X0, (4, 8, 8))
    purposes = (randomness.TIME, randomness.TEACHER_TIME, randomness.DROP)
    t, u, draws = (randomness.uniform(keys, purpose) for purpose in purposes)
    given = [1 - t[:, None, None, None], draws]
    torch.rand = lambda *_, **__: given.pop(0)
    torch.rand_like = lambda _: u[:, None, None, None]
    torch.randn_like = lambda _: x0
    objective = SRALoss(block_out_s=BLOCK, block_out_t=TEACHER_BLOCK, t_max=OFFSET)
    denoising, alignment = objective(student, x1, teacher, data["label"])
    (denoising.mean() + 0.2 * alignment).backward()  # the weight that their train.py begins with
    content = {"denoising": denoising.tolist(), "alignment": alignment.item(), "grad_norms": norms(student, HEAD)}
    (args.out / "sra.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
