"""The parts of a conversion on a Ray cluster: one actor per GPU, or per core, converts one whole part at a time.

If an actor dies, Ray gives its part to another. Without RAY_ADDRESS, a cluster of this machine is started, and ended.
The nodes of another need the dependencies, the source, the output and the credentials in the same places; not the code.
"""

import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import ray
import ray.data

import convert
import sit_composer
from convert.engine.decoders import Decoders
from convert.engine.output import Output, OutputError
from convert.engine.pipeline import Job, convert_parts
from convert.engine.shards import PartWriter
from convert.kinds.latents import Latents
from convert.sources.parts import InputError
from sit_composer.errors import UserError

MISTAKES = {"InputError": InputError, "OutputError": OutputError}  # exit code 2; other errors are a failure
RETRIES = 3  # of an actor that dies: an image that kills it would do so forever


class Converter:
    """Converts parts, with some processes of its own that decode. The rest makes the same `Job`."""

    def __init__(
        self, plan: ray.ObjectRef, kind: type, options: dict, out: str, prefix: str, skip_bad: bool, workers: int
    ) -> None:
        output = Output(out)
        output.prefix = prefix
        self.job = Job(ray.get(plan), kind(**options), output, skip_bad, PartWriter)
        self.decoders = Decoders(workers, self.job.kind.preload)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """The records of a batch's parts, as JSON; or the type and the message of an error."""
        try:
            records = list(convert_parts(self.job, map(int, batch["part"]), self.decoders, lambda *_: None))
            return {"kind": ["record"] * len(records), "content": list(map(json.dumps, records))}
        except (UserError, OSError) as error:
            return {"kind": [type(error).__name__], "content": [str(error)]}


def convert_on_ray(job: Job, options: dict[str, Any], todo: list[int]) -> Generator[dict[str, Any], None, None]:
    """Converts the parts with the numbers ``todo``, and yields the record of each, in any order. ``options`` are the
    arguments of the job's kind. Raises OSError for an actor's error that isn't the user's, or if the cluster fails."""
    if not todo:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    out = str(job.output.path or job.output.uri)  # absolute, as an actor has another working folder
    code = {"py_modules": [str(Path(package.__file__).parent) for package in (convert, sit_composer)]}
    handler = signal.getsignal(signal.SIGTERM)
    kind = type(job.kind)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=code)
        signal.signal(signal.SIGTERM, handler)  # ray has set its own
        ray.data.DataContext.get_current().enable_progress_bars = False  # `Progress` counts images
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if kind is Latents else 0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        cpus = max(1, int(min(node.get("CPU", 0) // node["GPU"] for node in nodes))) if gpus else 1  # per actor
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
                raise MISTAKES.get(row["kind"], OSError)(row["content"])
            yield json.loads(row["content"])
    except UserError:
        raise
    except (ray.exceptions.RayError, RuntimeError, ValueError, KeyError) as error:  # address, nodes, memory, …
        raise OSError(f"--engine ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()
