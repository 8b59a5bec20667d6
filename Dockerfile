# syntax=docker/dockerfile:1.9
#
# Two images from one file:
#   docker build --target server .                            serves bundles on CPUs; has no torch
#   docker build --target server --build-arg VARIANT=gpu .    serves bundles on an NVIDIA GPU
#   docker build --target exporter .                          trains, exports, calibrates; has torch
#
# Dependencies and code are layers of their own: a change of code moves a few hundred kilobytes.

ARG VARIANT=cpu

FROM python:3.11.13-slim-bookworm AS base-cpu

# onnxruntime-gpu is built for CUDA 13 and cuDNN 9.
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 AS base-gpu
# The base image fixes which Python this is; its patches may come.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM base-${VARIANT} AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

FROM base AS wheel
WORKDIR /src
COPY pyproject.toml README.md ./
COPY contract contract
COPY runtime runtime
COPY models models
COPY exporter exporter
COPY calibration calibration
COPY server server
COPY loadtest loadtest
COPY cli cli
RUN python3 -m venv /opt/build
RUN --mount=type=cache,target=/root/.cache/pip /opt/build/bin/pip wheel --no-deps --wheel-dir /wheel .

# One file of requirements for the project and one for each of its extras.
FROM base AS requirements
WORKDIR /requirements
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import pathlib, tomllib; \
project = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['project']; \
lists = {'server': project['dependencies'], **project['optional-dependencies']}; \
[pathlib.Path(f'{name}.txt').write_text('\n'.join(lines)) for name, lines in lists.items()]" \
    && python3 -m venv /opt/offramp

FROM requirements AS server-dependencies
ARG VARIANT
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/offramp/bin/pip install -c constraints.txt -r server.txt -r "${VARIANT}.txt"

FROM requirements AS exporter-dependencies
# An index that holds a CPU build of torch spares this image several gigabytes of CUDA libraries.
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/offramp/bin/pip install -c constraints.txt -r server.txt -r cpu.txt -r export.txt -r calibrate.txt

FROM base AS exporter
RUN useradd --uid 10001 --create-home offramp
COPY --from=exporter-dependencies /opt/offramp /opt/offramp
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /opt/offramp/bin/pip install --no-cache-dir --no-deps /wheel/*.whl
ENV PATH=/opt/offramp/bin:$PATH
USER 10001
# The user's own packages are imported from here; mount them, and a folder for what is written.
WORKDIR /work
ENTRYPOINT ["offramp"]
CMD ["export", "--help"]

FROM base AS server
RUN useradd --uid 10001 --create-home offramp
COPY --from=server-dependencies /opt/offramp /opt/offramp
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /opt/offramp/bin/pip install --no-cache-dir --no-deps /wheel/*.whl
ENV PATH=/opt/offramp/bin:$PATH OFFRAMP_HOST=0.0.0.0 OFFRAMP_PORT=8000
USER 10001
WORKDIR /home/offramp
EXPOSE 8000
# Loading and profiling the models comes before the first "ready".
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import http.client, os, sys; \
peer = http.client.HTTPConnection('127.0.0.1', int(os.environ['OFFRAMP_PORT']), timeout=4); \
peer.request('GET', '/v2/health/ready'); \
sys.exit(peer.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["offramp"]
CMD ["serve", "/bundle"]
