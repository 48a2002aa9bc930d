"""Compares pictures with real ones:   python -m sit_composer.evaluate SAMPLES --reference REFERENCE

SAMPLES and REFERENCE are each one of
  * an ADM batch: FILE.npz with arr_0, uint8 (N, H, W, 3);
  * a folder that sit_composer.sample wrote;
  * a folder of PNG or JPEG pictures, or of folders of them, one for each class;
  * a folder of MDS shards of pixels;
REFERENCE may also be stored statistics: FILE.npz with mu and sigma, for sFID mu_s and sigma_s. An ADM reference batch
holds both: the Fréchet distances take its statistics, the other metrics its pictures.

--features inception, the default, is torch-fidelity's FID InceptionV3, which published numbers are of. Its weights (95
MB) come over the network, once. Without it, or for other features, give --features FILE: a TorchScript module from
uint8 (N, 3, H, W) to features (N, D), to (features, logits), or to a dict of features, spatial and logits; sFID needs
spatial, the Inception Score logits. Loading FILE runs the code in it: take it only from someone whom you trust.

The last line printed is a Markdown row for a table of results.
"""

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sit_composer.errors import UserError
from sit_composer.names import SIZES

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")
OUTPUT = {"sfid": "spatial", "is": "logits"}  # that a metric needs of the extractor; the others need features
NEEDS_PICTURES = ("precision", "recall", "kid")  # of the reference too: its statistics don't do
LEAST = {"fid": 2, "sfid": 2, "is": 20, "precision": 4, "recall": 4, "kid": 2}  # pictures
STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
SUFFIXES = (".png", ".jpg", ".jpeg")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sit_composer.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("samples", metavar="SAMPLES", help="the pictures to judge")
    parser.add_argument("--reference", required=True, help="the real ones, or their statistics")
    parser.add_argument("--features", default="inception", metavar="inception|FILE", help="the extractor (inception)")
    parser.add_argument("--metrics", metavar="A,B,…", help=f"of {','.join(METRICS)} (all that can be had)")
    parser.add_argument("--out", metavar="FILE.json", help="write the result, and all that it depends on")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at a time (64)")
    parser.add_argument("--image-size", type=int, metavar="N", help="crop the reference's pictures to it, as ADM does")
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="keep the reference's, to use as --reference")
    args = parser.parse_args(argv)
    for name in ("batch_size", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: got {value}; it takes 1 or more")
    args.by_name = [] if args.metrics is None else [name.strip() for name in args.metrics.split(",")]
    for name in args.by_name:
        if name not in METRICS:
            parser.error(f"argument --metrics: got {name!r}; it takes {', '.join(METRICS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake that it names."""
    args = parse(argv)
    try:
        result = run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, reason in result["left_out"].items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join(markdown(result)))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The result: metrics, and what they depend on; written to ``args.out`` if that is given.

    Raises:
        UserError: for what cannot be read, or a metric asked for that cannot be had.
    """
    for name, suffix in (("out", ".json"), ("save_statistics", ".npz")):  # before an hour's work, not after it
        path = getattr(args, name)
        if path and (os.path.isdir(path) or not path.endswith(suffix)):
            raise UserError(f"--{name.replace('_', '-')}: got {path}; it takes a file's name that ends in {suffix}")
    samples = open_set(args.samples)
    reference = open_set(args.reference, args.image_size)
    chosen = Choice(args.by_name)
    chosen.check_sets(samples, reference)
    if args.save_statistics and reference.batches is None:
        raise UserError(f"--save-statistics: {reference.path} has nothing but statistics already")
    extractor = load_extractor(args.features)
    notes = check_statistics(reference, extractor)

    fake = extract(samples, extractor, args.batch_size, chosen)
    dimension = fake["features"].shape[1]
    stored = reference.statistics
    for output, (mu, _) in STATISTICS.items():
        if output in fake and mu in stored and stored[mu].shape != fake[output].shape[1:]:
            numbers = f"{stored[mu].size} {output} numbers, and {extractor.name} gives {fake[output].shape[1]}"
            raise UserError(f"{reference.path}: {mu} is of {numbers}: take the extractor that it was made with")
    real = {}
    if reference.batches and (not stored or set(chosen.names) & set(NEEDS_PICTURES) or args.save_statistics):
        real = extract(reference, extractor, args.batch_size, chosen, ("features", "spatial"))
        if reference.size != samples.size:
            sizes = [" × ".join(map(str, pictures.size)) for pictures in (samples, reference)]
            notes.append(f"the samples are {sizes[0]}, and the reference's pictures {sizes[1]}")
    for pictures in (samples,) if stored else (samples, reference):
        if "fid" in chosen.names and pictures.count <= dimension:
            notes.append(
                f"{pictures.path}: {pictures.count} pictures for {dimension} features: the covariance is singular, and "
                f"the Fréchet distance biased; take more than {dimension} (published numbers are of 50,000)"
            )
    if extractor.name != "inception":
        notes.append("the features are not Inception's: no number here compares with published ones")

    values, settings = compute(chosen.names, fake, real, stored)
    if args.save_statistics:
        save_statistics(Path(args.save_statistics), real, extractor.identity)
    result = {
        "metrics": values,
        "left_out": chosen.left_out,
        "warnings": notes,
        "settings": settings,
        "samples": {"path": samples.path, "count": samples.count, "size": samples.size, "sampling": samples.settings},
        "reference": {
            "path": reference.path,
            "count": reference.count,
            "size": reference.size,
            "image_size": args.image_size,
            "statistics": "stored" if stored else "computed",
        },
        "features": {"name": extractor.name, "of": extractor.identity, "dimension": dimension},
        "versions": versions(),
    }
    if args.out:
        from sit_composer.gallery import write_json

        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(result, Path(args.out))
    return result


def check_statistics(reference: "PictureSet", extractor: "Extractor") -> list[str]:
    """Forgets stored statistics of another extractor if there are pictures instead, and then says so.

    Raises:
        UserError: if there are none.
    """
    if not reference.statistics or reference.of in (None, extractor.identity):
        return []
    if reference.batches is None:
        raise UserError(f"{reference.path}: statistics of {reference.of}; --features has {extractor.identity}")
    reference.statistics = {}
    return [f"{reference.path}: its statistics are of {reference.of}; its pictures were taken instead"]


class Choice:
    """The metrics still to compute. One that can't be had is refused if asked for by name, else left out."""

    def __init__(self, by_name: list[str]) -> None:
        self.by_name = by_name
        self.names = [name for name in METRICS if not by_name or name in by_name]
        self.left_out: dict[str, str] = {}

    def drop(self, name: str, reason: str) -> None:
        if name in self.names:
            if name in self.by_name:
                raise UserError(f"--metrics {name}: {reason}")
            self.names.remove(name)
            self.left_out[name] = reason

    def check_sets(self, samples: "PictureSet", reference: "PictureSet") -> None:
        """Drops what the sets don't allow; an error if nothing remains."""
        if samples.batches is None:
            raise UserError(f"{samples.path}: holds statistics only; SAMPLES takes pictures")
        if reference.statistics and "mu_s" not in reference.statistics:
            self.drop("sfid", f"it needs mu_s and sigma_s, which {reference.path} has not")
        for name in METRICS:
            sets = [samples] if name == "is" else [samples, reference]
            if name in NEEDS_PICTURES and reference.batches is None:
                self.drop(name, f"it needs the reference's pictures, and {reference.path} has statistics only")
                sets = [samples]
            for pictures in sets:
                if pictures.batches and pictures.count < LEAST[name]:
                    self.drop(name, f"it needs {LEAST[name]} pictures or more; {pictures.path} has {pictures.count}")
        if not self.names:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()))


def compute(names: list[str], fake: dict, real: dict, stored: dict) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics, and the settings of those that have any."""
    from sit_composer import metrics

    values: dict[str, float] = {}
    settings: dict[str, Any] = {}
    for name, output in (("fid", "features"), ("sfid", "spatial")):
        if name in names:
            mu, sigma = STATISTICS[output]
            theirs = (stored[mu], stored[sigma]) if stored else metrics.statistics(real[output])
            values[name] = metrics.frechet_distance(*metrics.statistics(fake[output]), *theirs)
    if "is" in names:
        values["is"], values["is_std"] = metrics.inception_score(fake["logits"])
        settings |= {"is_splits": metrics.IS_SPLITS, "seed": metrics.SEED}
    if {"precision", "recall"} & set(names):
        both = dict(
            zip(("precision", "recall"), metrics.precision_recall(fake["features"], real["features"]), strict=True)
        )
        values |= {name: both[name] for name in both if name in names}
        settings["neighbours"] = metrics.NEIGHBOURS
    if "kid" in names:
        values["kid"], values["kid_std"] = metrics.kid(fake["features"], real["features"])
        size = min(metrics.KID_SUBSET_SIZE, len(fake["features"]), len(real["features"]))
        settings |= {"kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": size, "seed": metrics.SEED}
    return values, settings


# The pictures


@dataclass
class PictureSet:
    """Pictures, statistics of their features, or both."""

    path: str
    count: int | None = None  # of pictures; None if there are statistics only
    batches: Callable[[int], Iterator[Any]] | None = None  # batch size -> uint8 tensors (n, 3, H, W)
    statistics: dict[str, Any] = field(default_factory=dict)  # mu, sigma, mu_s, sigma_s
    of: str | None = None  # the identity of the extractor that the statistics are of, if known
    settings: dict | None = None  # sampling.json's, without the labels
    size: list[int] | None = None  # (H, W), known once they were read


def open_set(path: str, image_size: int | None = None) -> PictureSet:
    """Finds out what lies at ``path``, and how many pictures; none is read yet.

    Raises:
        UserError: if that is not any of what this command takes.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder")
    if os.path.isfile(path):
        return open_npz(path, image_size)
    folder = Path(path)
    if (folder / "index.json").exists():
        return open_shards(path, image_size)
    settings = read_settings(folder)
    if settings is not None:  # its grid.png is no sample
        names = [p for p in folder.iterdir() if re.fullmatch(r"\d{6,}\.png", p.name)]
        labels = settings.pop("labels", None)
        if labels is not None and len(names) != len(labels):
            raise UserError(f"{path}: holds {len(names)} of the {len(labels)} pictures asked for; draw the rest first")
    else:
        names = list_pictures(folder) or [
            p for sub in sorted(folder.iterdir()) if sub.is_dir() for p in list_pictures(sub)
        ]
    if not names:
        raise UserError(f"{path}: no PNG or JPEG pictures here, nor in folders here, nor shards with an index.json")
    names.sort()
    return PictureSet(path, len(names), lambda n: read_files(names, n, image_size), settings=settings)


def list_pictures(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]


def read_settings(folder: Path) -> dict | None:
    """The content of the folder's sampling.json, or None without one."""
    from sit_composer.gallery import SETTINGS

    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not what sit_composer.sample writes")
    return settings


def read_files(names: list[Path], batch_size: int, image_size: int | None) -> Iterator[Any]:
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from sit_composer.pictures import center_crop, decode_image

    def read(name: Path) -> Any:
        try:
            picture = decode_image(name.read_bytes(), 3)
        except Exception as error:
            raise UserError(f"{name}: not a picture that can be read ({error})") from None
        return center_crop(picture, image_size) if image_size else picture

    first = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(names), batch_size):
            batch = list(pool.map(read, names[start : start + batch_size]))
            first = batch[0].shape if first is None else first
            for name, picture in zip(names[start : start + batch_size], batch, strict=True):
                if picture.shape != first:
                    sizes = [f"{shape[1]} × {shape[2]}" for shape in (picture.shape, first)]
                    advice = "the reference's can be cropped by --image-size"
                    raise UserError(
                        f"{name}: is {sizes[0]}, and {names[0]} {sizes[1]}; all must have one size ({advice})"
                    )
            yield torch.stack(batch)


def open_shards(path: str, image_size: int | None) -> PictureSet:
    from sit_composer.stream import load_spec

    spec = load_spec(None, path)
    if spec.kind != "pixels":
        raise UserError(f"{path}: shards of {spec.kind}; take the shards of pixels that they were made from")
    if spec.image_size is None and image_size is None:
        raise UserError(f"{path}: its pictures differ in size; crop them by --image-size (the reference's only)")

    def batches(batch_size: int) -> Iterator[Any]:
        from sit_composer.data import build_loader

        options = {"image_size": image_size, "shuffle": False, "drop_last": False}
        for batch in build_loader(None, path, spec=spec, batch_size=batch_size, **options):
            yield batch["image"].expand(-1, 3, -1, -1)

    return PictureSet(path, spec.samples, batches)


def open_npz(path: str, image_size: int | None) -> PictureSet:
    """An ADM batch, statistics, or both; read by batches, as 50,000 pictures of 256 × 256 are 10 GB."""
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as content:
            names = set(content.files)
            statistics = {name: content[name] for pair in STATISTICS.values() for name in pair if name in names}
            of = str(content["features"]) if "features" in names else None
        shape = None
        if "arr_0" in names:
            with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as member:
                shape, fortran, dtype = read_header(member)
    except Exception as error:
        raise UserError(f"{path}: not an npz that can be read ({type(error).__name__}: {error})") from None
    for mu, sigma in STATISTICS.values():
        if (mu in statistics) != (sigma in statistics):
            raise UserError(f"{path}: has only one of {mu} and {sigma}")
        if mu in statistics:
            shapes = statistics[mu].shape, statistics[sigma].shape
            if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
                raise UserError(f"{path}: {mu} and {sigma} are {shapes[0]} and {shapes[1]}, not (D,) and (D, D)")
            if not all(a.dtype.kind == "f" and np.isfinite(a).all() for a in (statistics[mu], statistics[sigma])):
                raise UserError(f"{path}: {mu} or {sigma} has numbers that are not finite")
    if shape is None and "mu" not in statistics:
        raise UserError(f"{path}: has neither arr_0 nor mu and sigma, but {', '.join(sorted(names)) or 'nothing'}")
    if shape is None:
        return PictureSet(path, statistics=statistics, of=of)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or 0 in shape or fortran:
        order = ", in Fortran's order" if fortran else ""
        raise UserError(f"{path}: arr_0 is {dtype} {shape}{order}; it takes uint8 (N, H, W, 3), in C's order")

    def batches(batch_size: int) -> Iterator[Any]:
        import torch

        from sit_composer.pictures import center_crop

        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as member:
            read_header(member)
            for start in range(0, shape[0], batch_size):
                n = min(batch_size, shape[0] - start)
                try:
                    content = bytearray(member.read(n * shape[1] * shape[2] * 3))
                    pictures = torch.frombuffer(content, dtype=torch.uint8).view(n, *shape[1:]).permute(0, 3, 1, 2)
                except Exception as error:
                    raise UserError(f"{path}: cut short or damaged at picture {start} ({error})") from None
                yield torch.stack([center_crop(p, image_size) for p in pictures]) if image_size else pictures

    # An ADM reference batch doesn't say so, but its statistics are Inception's.
    of = of or ("inception" if statistics else None)
    return PictureSet(path, shape[0], batches, statistics, of, settings_beside(Path(path), shape[0]))


def read_header(member: Any) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, Fortran order and dtype of the npy file, of which the array follows."""
    from numpy.lib import format as npy

    version = npy.read_magic(member)
    return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(member)


def settings_beside(npz: Path, count: int) -> dict | None:
    """The sampling.json in the npz's folder, or in the folder that is named like it, if of as many pictures."""
    for folder in (npz.with_suffix(""), npz.parent):
        settings = read_settings(folder)
        if settings is not None and len(settings.pop("labels", None) or []) == count:
            return settings
    return None


# Their features


@dataclass
class Extractor:
    """A network from uint8 pictures (N, 3, H, W) to a dict of features, and spatial and logits if it has them."""

    name: str  # inception, or the file's name
    identity: str  # inception, or the file's sha256
    network: Callable[[Any], Any]
    device: str

    def __call__(self, pictures: Any) -> dict[str, Any]:
        """Float32 arrays (N, D) on the CPU.

        Raises:
            UserError: if it fails, or returns something else.
        """
        import torch

        try:
            with torch.inference_mode():
                out = self.network(pictures.to(self.device))
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            advice = "; take a smaller --batch-size" if isinstance(error, torch.OutOfMemoryError) else ""
            shape = tuple(pictures.shape)
            raise UserError(f"{self.name}: failed on pictures {shape}: {lines[-1].strip()}{advice}") from error
        if isinstance(out, torch.Tensor):
            out = {"features": out}
        elif isinstance(out, tuple) and len(out) == 2:
            out = {"features": out[0], "logits": out[1]}
        if not isinstance(out, dict) or not isinstance(out.get("features"), torch.Tensor):
            raise UserError(f"{self.name}: returned neither features, (features, logits) nor a dict with 'features'")
        out = {name: out[name] for name in ("features", "spatial", "logits") if out.get(name) is not None}
        if "spatial" in out:
            out["spatial"] = out["spatial"].flatten(1)
        for name, value in out.items():
            if value.ndim != 2 or len(value) != len(pictures):
                raise UserError(
                    f"{self.name}: {name} are {tuple(value.shape)} for {len(pictures)} pictures, not (N, D)"
                )
        return {name: value.float().cpu().numpy() for name, value in out.items()}


def load_extractor(features: str) -> Extractor:
    """The extractor called ``inception``, or that of a TorchScript file.

    Raises:
        UserError: if there is none, or its weights can't be fetched.
    """
    import hashlib

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if features == "inception":
        return Extractor("inception", "inception", load_inception(device), device)
    if not os.path.isfile(features):
        raise UserError(f"--features: {features} is no file; it takes inception, or a TorchScript file")
    try:
        network = torch.jit.load(features, map_location=device).eval()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--features: {features} is not a TorchScript module (torch.jit.save): {reason}") from None
    with open(features, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Extractor(Path(features).name, f"sha256:{digest}", network, device)


def load_inception(device: str) -> Callable[[Any], dict[str, Any]]:
    """FID's InceptionV3 with all three outputs."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], verbose=True)
    except Exception as error:
        cache = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
        raise UserError(
            f"--features inception: its weights come over the network once, and can't be had ({error}); "
            f"put {URL_INCEPTION_V3} at {cache}, or give --features FILE"
        ) from None
    network.to(device)
    seen = {}
    # sFID (Nash et al. 2021, arXiv 2103.03841) as ADM has it: the first 7 channels of TensorFlow's mixed_6, which is
    # Mixed_6d here, in its order (H, W, C), in which mu_s and sigma_s of ADM's reference batches are.
    network.Mixed_6d.register_forward_hook(
        lambda module, args, out: seen.update(spatial=out[:, :7].permute(0, 2, 3, 1))
    )

    def forward(pictures: Any) -> dict[str, Any]:
        features, logits = network(pictures)
        return {"features": features, "logits": logits, "spatial": seen.pop("spatial")}

    return forward


def extract(
    pictures: PictureSet,
    extractor: Extractor,
    batch_size: int,
    chosen: Choice,
    outputs: tuple = ("features", "spatial", "logits"),
) -> dict[str, Any]:
    """Those outputs that the chosen metrics need: float32 arrays (N, D). Notes the pictures' size.

    Raises:
        UserError: if pictures or extractor fail, an output is not finite, or lacks for a metric asked for by name.
    """
    import numpy as np
    from tqdm import tqdm

    parts: dict[str, list[Any]] = {}
    done = 0
    with tqdm(total=pictures.count, unit="img", desc=f"features of {Path(pictures.path).name}") as bar:
        for batch in pictures.batches(batch_size):
            out = extractor(batch)
            if not done:
                pictures.size = list(batch.shape[-2:])
                for name, output in OUTPUT.items():
                    if output not in out:
                        chosen.drop(name, f"it needs {output}, which {extractor.name} doesn't give")
            needed = {"features"} | {OUTPUT[name] for name in chosen.names if name in OUTPUT}
            for name in [name for name in outputs if name in needed]:
                bad = ~np.isfinite(out[name]).all(axis=1)
                if bad.any():
                    raise UserError(
                        f"{extractor.name}: {name} of picture {done + bad.argmax()} of {pictures.path} are not finite"
                    )
                if parts.get(name) and parts[name][0].shape[1] != out[name].shape[1]:
                    raise UserError(
                        f"{extractor.name}: {name} are of another length from picture {done} of {pictures.path} on"
                    )
                parts.setdefault(name, []).append(out[name])
            done += len(batch)
            bar.update(len(batch))
    if done != pictures.count:
        raise UserError(f"{pictures.path}: {done} pictures were read of {pictures.count}")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


# The result


def save_statistics(path: Path, outputs: dict[str, Any], identity: str) -> None:
    """Writes mu, sigma and, if there are spatial features, mu_s and sigma_s; and what they are features of."""
    import numpy as np

    from sit_composer.metrics import statistics

    arrays = {}
    for output, names in STATISTICS.items():
        if output in outputs:
            arrays |= zip(names, statistics(outputs[output]), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays, features=np.array(identity))


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("sit-composer", "torch", "torch-fidelity", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def markdown(result: dict[str, Any]) -> list[str]:
    """A Markdown table's head and row. Distances of features that aren't Inception's are called FD, not FID."""
    sampling, values = result["samples"]["sampling"] or {}, result["metrics"]
    inception = result["features"]["name"] == "inception"
    distance, digits = ("FID", ".2f") if inception else ("FD", ".4g")
    sampler = " ".join(str(sampling[name]) for name in ("mode", "sampling_method") if name in sampling)
    cells = {
        "model": model_name(sampling.get("model")),
        "sampler": sampler or "–",
        **{
            head: sampling.get(name, "–")
            for head, name in (("evals", "evaluations"), ("cfg", "cfg_scale"), ("seed", "seed"))
        },
        distance: f"{values['fid']:{digits}}" if "fid" in values else "–",
        f"s{distance}": f"{values['sfid']:{digits}}" if "sfid" in values else "–",
        "IS": f"{values['is']:.2f}" if "is" in values else "–",
        "P": f"{values['precision']:.3f}" if "precision" in values else "–",
        "R": f"{values['recall']:.3f}" if "recall" in values else "–",
        "KID × 10³": f"{1000 * values['kid']:.3f}" if "kid" in values else "–",
    }
    rows = [cells.keys(), ["---"] * len(cells), map(str, cells.values())]
    return ["| " + " | ".join(row) + " |" for row in rows]


def model_name(model: dict | None) -> str:
    """SiT-B/2 for the arguments of that size; others are told by width × depth."""
    if not isinstance(model, dict) or "hidden_size" not in model:
        return "–"
    size = (model["hidden_size"], model.get("depth"), model.get("num_heads"))
    name = next((name for name, known in SIZES.items() if known == size), f"{size[0]}×{size[1]}")
    return f"SiT-{name}/{model.get('patch_size')}"


if __name__ == "__main__":
    sys.exit(main())
