# An image of this repository for clusters: Python 3.11 and torch with its own CUDA 12.6; the host brings NVIDIA's driver.
#   docker build -t REGISTRY/sit_composer . && docker push REGISTRY/sit_composer
#   docker run --rm --gpus all --shm-size=16g REGISTRY/sit_composer -n 8 -m sit_composer.doctor
# Credentials come from the environment at the run (--env-file FILE), and are in no layer.
FROM python:3.11.13-slim-bookworm

# gcc and libc6-dev: torch.compile. libibverbs: NCCL over InfiniBand.
# hadolint ignore=DL3008 # Debian keeps no earlier versions of packages, so a pin would soon fail
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev ibverbs-providers libibverbs1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 sit

WORKDIR /sit_composer
# Compiled, as the user who runs it can't write there.
ENV PYTHONUNBUFFERED=1 UV_SYSTEM_PYTHON=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1

# The packages are a layer of their own, which only a change of pyproject.toml makes again.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir sit_composer convert \
    && touch sit_composer/__init__.py convert/__init__.py \
    && pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --editable '.[alignment,clouds,tensorboard,wandb]'

COPY sit_composer sit_composer
COPY convert convert
COPY yamls yamls
# Again, so that the command "composer" is this project's: mosaicml installs one of that name.
RUN uv pip install --no-deps --reinstall-package sit-composer --editable . \
    && install --directory --owner=sit runs

USER 1000
ENTRYPOINT ["composer"]
CMD ["-m", "sit_composer.doctor"]
