# q3q with CUDA 13.0, the one that torch on PyPI is built for (driver 580 or newer). For an older driver:
#   docker build --build-arg BASE=nvidia/cuda:12.6.3-base-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 -t q3q:cu126 .
# On a machine without GPUs:
#   docker build --build-arg BASE=ubuntu:24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t q3q:cpu .
# Nothing secret goes in: tokens and passwords come as environment variables or mounted files when it runs.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE}

# gcc and Python's headers: Triton builds its launchers with them. rsync and wget: Ray's launcher and KubeRay's probes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv rsync wget \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 --shell /bin/bash q3q \
    && mkdir --parents /opt/q3q /storage \
    && chown q3q:q3q /opt/q3q /storage
USER q3q
WORKDIR /opt/q3q
ENV PATH=/opt/q3q/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    HF_HOME=/storage/huggingface

# What changes seldom comes first: an edit of q3q does not install torch again.
ARG TORCH_INDEX=
COPY --chown=q3q:q3q pyproject.toml constraints.txt ./
COPY --chown=q3q:q3q cluster/requirements.txt cluster/
RUN python3 -m venv .venv \
    && .venv/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /tmp/needs.txt \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        --requirement /tmp/needs.txt --requirement cluster/requirements.txt \
    && rm /tmp/needs.txt

COPY --chown=q3q:q3q . .
RUN .venv/bin/pip install --no-cache-dir --no-deps --editable .

VOLUME /storage
CMD ["python", "launch.py", "--help"]
