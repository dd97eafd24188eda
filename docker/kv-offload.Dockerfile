# The sidecar that keeps the KV cache of paused answers in host memory and on disk. No torch.
#
#   docker build -f docker/kv-offload.Dockerfile -t fastserve/kv-offload .
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_ARGS=""
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/venv
COPY docker/locks/build.txt docker/locks/kv-offload.txt /locks/
RUN /build/bin/pip install --no-cache-dir ${PIP_ARGS} --no-deps -r /locks/build.txt \
 && /build/bin/pip --python /opt/venv/bin/python install --no-cache-dir ${PIP_ARGS} --no-deps -r /locks/kv-offload.txt
COPY proto /src/proto
COPY services/common /src/common
COPY services/kv-offload /src/kv-offload
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /src/proto /src/common /src/kv-offload \
 && /build/bin/pip --python /opt/venv/bin/python install --no-deps --no-index /wheels/*.whl \
 && /build/bin/pip --python /opt/venv/bin/python check

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="fastserve-kv-offload" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 fastserve \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /var/lib/fastserve fastserve \
 && install -d -o 10001 -g 10001 /run/fastserve
COPY --from=build /opt/venv /opt/venv
# /run/fastserve holds the socket and the pool: shared with the worker, in memory.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FASTSERVE_LISTEN=unix:/run/fastserve/kv-offload.sock \
    FASTSERVE_POOL_DIR=/run/fastserve \
    FASTSERVE_METRICS_HOST=0.0.0.0 \
    FASTSERVE_METRICS_PORT=9101
USER 10001:10001
EXPOSE 9101
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s \
  CMD python -m fastserve.common.healthcheck "${FASTSERVE_LISTEN}"
ENTRYPOINT ["python", "-m", "fastserve.kv_offload"]
