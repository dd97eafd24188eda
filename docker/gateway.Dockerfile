# The gateway. It has no torch and no weights: only the tokenizer and the configuration of the model
# in the worker's image, which is therefore built first.
#
#   docker build -f docker/gateway.Dockerfile -t fastserve/gateway .
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG MODEL_IMAGE=fastserve/worker:0.1.0

FROM ${MODEL_IMAGE} AS model
USER root
RUN mkdir /tokenizers && cd /models && find . \( -name '*.json' -o -name '*.jinja' \) -exec cp --parents {} /tokenizers ';'

FROM ${BASE_IMAGE} AS build
ARG PIP_ARGS=""
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/venv
COPY docker/locks/build.txt docker/locks/gateway.txt /locks/
RUN /build/bin/pip install --no-cache-dir ${PIP_ARGS} --no-deps -r /locks/build.txt \
 && /build/bin/pip --python /opt/venv/bin/python install --no-cache-dir ${PIP_ARGS} --no-deps -r /locks/gateway.txt
COPY proto /src/proto
COPY services/common /src/common
COPY services/gateway /src/gateway
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /src/proto /src/common /src/gateway \
 && /build/bin/pip --python /opt/venv/bin/python install --no-deps --no-index /wheels/*.whl \
 && /build/bin/pip --python /opt/venv/bin/python check

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="fastserve-gateway" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 fastserve \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /var/lib/fastserve fastserve \
 && install -d -o 10001 -g 10001 /run/fastserve
COPY --from=build /opt/venv /opt/venv
COPY --from=model /tokenizers /models
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FASTSERVE_HOST=0.0.0.0 \
    FASTSERVE_PORT=8000 \
    FASTSERVE_MODEL=/models/SmolLM2-135M-Instruct
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s \
  CMD python -m fastserve.common.healthcheck "http://127.0.0.1:${FASTSERVE_PORT}/readyz"
ENTRYPOINT ["python", "-m", "fastserve.gateway"]
