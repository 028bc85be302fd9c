# fitune with its pinned packages, for `docker run --gpus all --shm-size=8g`, SkyPilot (--image) and Kubernetes (--image).
#
#   docker build -t fitune .
#   docker run --gpus all --shm-size=8g -v $PWD:/data fitune train llama3_8b_qlora
#
# torch brings CUDA's libraries; the driver and nvidia-container-toolkit are the host's.
FROM python:3.12-slim-bookworm

# Triton compiles a kernel's launcher when it first runs, and needs a C compiler for it
# (Debian keeps one version of each package: a pinned one is gone with the next fix)
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/fitune
COPY requirements.txt requirements-gpu.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-gpu.txt

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY fitune fitune
COPY recipes recipes
COPY accelerate_configs accelerate_configs
COPY examples examples
RUN pip install --no-cache-dir --no-deps .

# runs, data and the Hub's cache belong on a volume
ENV HF_HOME=/data/huggingface
WORKDIR /data
ENTRYPOINT ["fitune"]
