"""The parts of a conversion on a Ray cluster: an actor for each GPU, or for each core, does one whole part at a time.

What a part becomes is what one process makes of it. Ray starts an actor anew if its process or its node dies, and gives
its part to another; shards appear whole, so that a part that is done twice is no harm.

Without RAY_ADDRESS, a cluster of this machine alone is started, and ended. The nodes of another need the project's
dependencies, the source, the output and the credentials where this one has them; the code is sent to them.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data

import convert
import sit_composer
from convert.engine.output import Output, OutputError
from convert.engine.pipeline import Decoders, Job, convert_parts
from convert.kinds.pixels import Pixels
from convert.sources.registry import InputError
from sit_composer.errors import UserError

ERRORS = {"InputError": InputError, "OutputError": OutputError}  # others are UserError


RETRIES = 3  # of an actor that dies: a picture that ends it would do so for ever


class Converter:
    """Does parts.

    Args:
        plan, skip_bad: the `Job`'s.
        kind, options: the class of its form, and that one's arguments.
        out, prefix: the output's address, and its `prefix`.
        workers: processes of its own that decode.
    """

    def __init__(
        self,
        plan: ray.ObjectRef,
        kind: type,
        options: dict[str, Any],
        out: str,
        prefix: str,
        skip_bad: bool,
        workers: int,
    ) -> None:
        output = Output(out)
        output.prefix = prefix
        self.job = Job(ray.get(plan), kind(**options), output, skip_bad)
        self.decoders = Decoders(workers, self.job.form.preload)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """The records of the parts of a batch, as JSON; or what was wrong, and of which kind that is."""
        try:
            records = list(convert_parts(self.job, map(int, batch["part"]), self.decoders, lambda size, skipped: None))
            return {"kind": ["record"] * len(records), "content": list(map(json.dumps, records))}
        except (InputError, OutputError, UserError, OSError) as error:
            return {"kind": [type(error).__name__], "content": [str(error)]}


def convert_on_ray(job: Job, kind: type, options: dict[str, Any], todo: list[int]) -> Iterator[dict[str, Any]]:
    """Converts the parts of those numbers, and yields the record of each, in any order.

    Args:
        job: the conversion.
        kind, options: the class of the job's form, and that one's arguments.
        todo: the parts' numbers.

    Raises:
        InputError, OutputError, UserError: what an actor's `convert_parts` raised.
    """
    if not todo:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    out = str(job.output.path or job.output.uri)  # an actor has a working folder of its own
    code = {"py_modules": [str(Path(package.__file__).parent) for package in (convert, sit_composer)]}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=code)
        signal.signal(signal.SIGTERM, handler)  # ray has set its own
        ray.data.DataContext.get_current().enable_progress_bars = False  # there is one that counts pictures
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if kind is not Pixels else 0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        cpus = max(1, int(min(node.get("CPU", 0) // node["GPU"] for node in nodes))) if gpus else 1  # of an actor
        workers = cpus if gpus else 0
        rows = ray.data.from_items([{"part": number} for number in todo], override_num_blocks=len(todo)).map_batches(
            Converter,
            fn_constructor_args=(ray.put(job.plan), kind, options, out, job.output.prefix, job.skip_bad, workers),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(gpus or int(resources["CPU"]), len(todo))),
            num_gpus=1 if gpus else 0,
            num_cpus=cpus,
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
        for row in rows.iter_rows():
            if row["kind"] != "record":
                raise ERRORS.get(row["kind"], UserError)(row["content"])
            yield json.loads(row["content"])
    except (ray.exceptions.RayError, RuntimeError, ValueError, KeyError) as error:  # its address, nodes, memory, …
        raise UserError(f"--engine ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()
