# The scheduler. No torch.
#
#   docker build -f docker/scheduler.Dockerfile -t fastserve/scheduler .
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_ARGS=""
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/venv
COPY docker/locks/build.txt docker/locks/scheduler.txt /locks/
RUN /build/bin/pip install --no-cache-dir ${PIP_ARGS} --no-deps -r /locks/build.txt \
 && /build/bin/pip --python /opt/venv/bin/python install --no-cache-dir ${PIP_ARGS} --no-deps -r /locks/scheduler.txt
COPY proto /src/proto
COPY services/common /src/common
COPY services/scheduler /src/scheduler
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /src/proto /src/common /src/scheduler \
 && /build/bin/pip --python /opt/venv/bin/python install --no-deps --no-index /wheels/*.whl \
 && /build/bin/pip --python /opt/venv/bin/python check

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="fastserve-scheduler" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 fastserve \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /var/lib/fastserve fastserve \
 && install -d -o 10001 -g 10001 /run/fastserve
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FASTSERVE_LISTEN=0.0.0.0:7070 \
    FASTSERVE_METRICS_HOST=0.0.0.0 \
    FASTSERVE_METRICS_PORT=9100
USER 10001:10001
EXPOSE 7070 9100
# A standby is NOT_SERVING: restart nothing because of this.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s \
  CMD python -m fastserve.common.healthcheck "${FASTSERVE_LISTEN}"
ENTRYPOINT ["python", "-m", "fastserve.scheduler"]
