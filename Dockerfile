# EgoHOD and its pinned packages, for NVIDIA GPUs (driver 580 or later) and for machines without one.
#
#   docker build --tag egohod .
#   docker run --rm --gpus all --shm-size=16g --volume "$PWD:/work" --user "$(id -u):$(id -g)" egohod demo --short
#
# --shm-size: loader processes hand batches over in /dev/shm, of which Docker gives 64 MB; a run warns when it is too
# small and says how much it wants. What a run writes is in the mounted folder.
#
# The image without CUDA's libraries: PyTorch's packages bring their own. The driver is the host's.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}
# video: decoding with NVDEC (data.decoder=cuda). HOME: whatever --user is, caches have a place.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video HOME=/tmp PATH=/opt/egohod/bin:$PATH
# Versions of the distribution; those that matter are pinned in requirements.txt.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/egohod
COPY requirements.txt /opt/source/
RUN pip install --no-cache-dir --requirement /opt/source/requirements.txt
COPY pyproject.toml README.md LICENSE /opt/source/
COPY egohod /opt/source/egohod
COPY tools /opt/source/tools
COPY configs /opt/source/configs
COPY docs /opt/source/docs
RUN pip install --no-cache-dir --no-deps /opt/source && useradd --uid 10001 egohod && install -d -o egohod /work
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["egohod"]
CMD ["--help"]
