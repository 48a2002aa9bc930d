"""What a run adds to Composer's callbacks: a record of what is trained, and the quality of its samples."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sit_composer.autoencoder import Autoencoder, to_uint8
from sit_composer.ema import EMAWeights
from sit_composer.features import Extractor
from sit_composer.gallery import write_grid, write_json
from sit_composer.generate import Sampling, generate
from sit_composer.guidance import Guidance
from sit_composer.metrics import frechet_distance, statistics


class RunRecord(Callback):
    """Keeps in every checkpoint what its weights mean: the network, the transport, the autoencoder, the classes.

    So a checkpoint can be sampled from wherever it was moved to. ``save_config`` is called once, when the first batch
    is about to be trained: a run that was refused, or is finished, leaves no config behind.
    """

    def __init__(self, record: dict[str, Any], save_config: Callable[[], None] | None = None):
        self.record = record
        self.save_config = save_config

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.save_config is not None:
            self.save_config()
            self.save_config = None

    def state_dict(self) -> dict[str, Any]:
        # As one text: sharded loading goes into dicts, writes to what it finds there, and misses what it doesn't.
        return {"record": json.dumps(self.record)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        theirs, ours = json.loads(state["record"])["classes"], self.record["classes"]
        if theirs != ours:
            pairs = enumerate(zip(theirs, ours, strict=False))
            label = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
            raise ValueError(f"the checkpoint was trained on other classes than the data has, from label {label} on")


class Drawing:
    """Draws pictures from the averaged weights in the middle of training, each rank its share of them.

    Their noise comes from generators of their own, and the network is in evaluation mode meanwhile: training's bits
    are the same with it and without. All ranks call the network equally often, as sharded weights need.

    Args:
        labels: of the pictures, in order.
        sampling: how they are drawn.
        autoencoder: decodes them.
        weights: the average; None draws from the training weights.
        batch_size: pictures at a time on a rank.
        before_each: called before each such batch, on all ranks; it may raise.
    """

    def __init__(
        self,
        labels: list[int],
        sampling: Sampling,
        autoencoder: Autoencoder,
        weights: EMAWeights | None,
        batch_size: int = 64,
        before_each: Callable[[], None] = lambda: None,
    ):
        self.labels = labels
        self.sampling = sampling
        self.autoencoder = autoencoder
        self.weights = weights
        self.batch_size = batch_size
        self.before_each = before_each

    def __call__(self, state: State, process: Callable[[Tensor], Tensor]) -> Tensor:
        """What process makes of the pictures, uint8 (n, C, H, W), put together: a row a picture, on every rank."""
        model = state.model.module if hasattr(state.model, "module") else state.model  # DDP's wrapper
        rank, ranks, count = dist.get_global_rank(), dist.get_world_size(), len(self.labels)
        share = [min(i, count - 1) for i in range(rank, -(-count // ranks) * ranks, ranks)]  # the last one to fill up
        training = model.training
        model.eval()
        parts = []
        # FSDP2 gathers weights in the precision of training, autocast's, and callbacks are called without autocast.
        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        precision = get_precision_context(state.precision) if sharded else nullcontext()
        averaged = self.weights.in_model() if self.weights is not None else nullcontext()
        with torch.no_grad(), averaged, precision:
            guidance = Guidance(model.network, self.sampling.cfg_scale)
            for start in range(0, len(share), self.batch_size):
                self.before_each()
                indices = share[start : start + self.batch_size]
                labels = [self.labels[i] for i in indices]
                latents, _ = generate(guidance, model.transport, labels, indices, self.sampling)
                parts.append(process(to_uint8(self.autoencoder.decode(latents.float()))))
        model.train(training)
        shares = dist.all_gather(torch.cat(parts))  # of rank 0, 1, …
        return torch.stack(list(shares), dim=1).flatten(0, 1)[:count]


class SampleGrid(Callback):
    """Draws the same pictures every so often: a PNG in ``folder``, an image in the loggers.

    Args:
        interval: how often, a time string such as ``1000ba``; and at the end of training.
        drawing: what is drawn.
        folder: where the PNGs go, as ``ba0001000.png``; None: to the loggers alone.
    """

    def __init__(self, interval: str, drawing: Drawing, folder: str | None):
        self.due = create_interval_scheduler(interval)
        self.drawing = drawing
        self.folder = folder

    def batch_checkpoint(self, state: State, logger: Logger, event: Event = Event.BATCH_CHECKPOINT) -> None:
        if not self.due(state, event):
            return
        levels = self.drawing(state, lambda pictures: pictures).cpu()  # (N, C, H, W)
        if dist.get_global_rank() != 0:
            return
        batch = int(state.timestamp.batch)
        logger.log_images(levels.float().div(255), name="samples", channels_last=False, step=batch)
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            arrays = levels.permute(0, 2, 3, 1).numpy()
            pictures = [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else np.ascontiguousarray(a)) for a in arrays]
            write_grid(pictures, self.drawing.labels, Path(self.folder) / f"ba{batch:07d}.png")

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.batch_checkpoint(state, logger, Event.EPOCH_CHECKPOINT)


class FrechetDistance(Callback):
    """Measures every so often how far drawn pictures are from real ones; logs ``metrics/frechet_distance``.

    The values so far are in the checkpoint, so that a resumed run has those that an uninterrupted one has. With few
    pictures the number is biased upwards: compare it with others of the same count only.

    Args:
        interval: how often, a time string such as ``10000ba``; and at the end of training.
        drawing: what is drawn.
        extractor: gives the pictures' features.
        reference: mean (D,) and covariance (D, D) of the real ones' features.
        file: where the values go, as JSON; None: to the loggers alone.
    """

    def __init__(
        self,
        interval: str,
        drawing: Drawing,
        extractor: Extractor,
        reference: tuple[np.ndarray, np.ndarray],
        file: str | None,
    ):
        self.due = create_interval_scheduler(interval)
        self.drawing = drawing
        self.extractor = extractor
        self.reference = reference
        self.file = file
        self.values: dict[str, float] = {}  # batch -> distance

    def batch_checkpoint(self, state: State, logger: Logger, event: Event = Event.BATCH_CHECKPOINT) -> None:
        if not self.due(state, event):
            return
        features = self.drawing(state, self.features).cpu().numpy()  # (N, D)
        distance: list[float | None] = [None]
        if dist.get_global_rank() == 0:
            distance = [frechet_distance(*statistics(features), *self.reference)]
        dist.broadcast_object_list(distance)
        batch = int(state.timestamp.batch)
        self.values[str(batch)] = distance[0]
        logger.log_metrics({"metrics/frechet_distance": distance[0]})
        if dist.get_global_rank() != 0:
            return
        print(f"batch {batch}: Fréchet distance {distance[0]:.2f} of {len(self.drawing.labels)} pictures", flush=True)
        if self.file is not None:
            Path(self.file).parent.mkdir(parents=True, exist_ok=True)
            names = ("sampling_method", "num_steps", "cfg_scale", "seed")
            what = {name: getattr(self.drawing.sampling, name) for name in names}
            what |= {"pictures": len(self.drawing.labels), "features": self.extractor.identity}
            write_json({**what, "frechet_distance": self.values}, Path(self.file))

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.batch_checkpoint(state, logger, Event.EPOCH_CHECKPOINT)

    def features(self, pictures: Tensor) -> Tensor:
        """Features (n, D) of pictures (n, C, H, W)."""
        features = self.extractor(pictures.expand(-1, 3, -1, -1))["features"]
        return torch.from_numpy(features).to(pictures.device)

    def state_dict(self) -> dict[str, Any]:
        return {"values": json.dumps(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = json.loads(state["values"])
