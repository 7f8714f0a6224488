# The image of the project: every job of a cluster, the MLflow server and the command line run from it.
#   make image        (docker, or buildah where there is no Docker)
ARG BASE=docker.io/library/python:3.11-slim-bookworm

ARG UV_VERSION=0.13.9

# What the lock says, in a layer of its own: 6 GB that a change of code leaves alone. The final stage begins here and copies none of it,
# because buildah copies first and asks its cache afterwards.
FROM ${BASE} AS dependencies
ARG UV_VERSION
COPY requirements.txt /opt/dho/requirements.txt
RUN python -m venv /tmp/uv \
    && /tmp/uv/bin/pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" \
    && /tmp/uv/bin/uv venv --quiet --no-cache --allow-existing --python /usr/local/bin/python /opt/dho \
    && /tmp/uv/bin/uv pip install --no-cache --python /opt/dho/bin/python --compile-bytecode --require-hashes \
       --requirement /opt/dho/requirements.txt \
    && rm -rf /tmp/uv /root/.cache

FROM dependencies AS package
ARG UV_VERSION
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}"
WORKDIR /src
COPY . .
RUN /opt/uv/bin/uv pip install --no-cache --python /opt/dho/bin/python --prefix /opt/package --compile-bytecode --no-deps \
       --build-constraints requirements-dev.txt .

FROM dependencies
RUN groupadd --gid 10001 dho \
    && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /home/dho --shell /usr/sbin/nologin dho \
    && install --directory --owner 10001 --group 10001 /work
COPY --from=package /opt/package /opt/dho
# The root file system may be read-only: whatever writes a cache, writes it below /tmp.
ENV PATH=/opt/dho/bin:${PATH} \
    HOME=/home/dho \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    HF_HOME=/tmp/huggingface \
    TORCH_HOME=/tmp/torch \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    DVC_SITE_CACHE_DIR=/tmp/dvc/site \
    DVC_GLOBAL_CONFIG_DIR=/tmp/dvc/global \
    DVC_SYSTEM_CONFIG_DIR=/tmp/dvc/system \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["dho"]

ARG VERSION=0.1.0
ARG GIT_COMMIT=
ENV GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="dho" \
      org.opencontainers.image.description="Dual-Head Optimization: train, evaluate and register a small classifier from a vision-language teacher" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
