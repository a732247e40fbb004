# The server's image. `--target cpu` (the default) carries onnxruntime, `--target gpu` carries onnxruntime-gpu and the
# CUDA libraries it needs; never both, as the two overwrite each other's files. Any Debian-like image with Python 3.11
# or newer and its venv module serves as BASE_IMAGE. Both stages use it, so the copied environment finds its Python.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Compiled once here: at run time the root is read-only. pip lives in an environment of its own and stays behind.
# PIP_CONSTRAINT, unlike -c, holds for what builds the wheel too.
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/attnserve
# Dependencies first, from the metadata and empty packages, so that a change of code costs no download.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p client/attnserve_client proto/attnserve server/attnserve_server

FROM build AS build-gpu
RUN /opt/pip/bin/pip --python /opt/attnserve/bin/python3 install ".[server-gpu]" "onnxruntime-gpu[cuda,cudnn]"
COPY client/attnserve_client client/attnserve_client
COPY proto/attnserve proto/attnserve
COPY server/attnserve_server server/attnserve_server
RUN /opt/pip/bin/pip --python /opt/attnserve/bin/python3 install --no-deps --force-reinstall .

FROM build AS build-cpu
RUN /opt/pip/bin/pip --python /opt/attnserve/bin/python3 install ".[server]"
COPY client/attnserve_client client/attnserve_client
COPY proto/attnserve proto/attnserve
COPY server/attnserve_server server/attnserve_server
RUN /opt/pip/bin/pip --python /opt/attnserve/bin/python3 install --no-deps --force-reinstall .

FROM ${BASE_IMAGE} AS runtime
# MALLOC_*: after a burst of large replies glibc keeps the freed memory; with fixed thresholds of 128 KiB it gives it
# back, and a large map never leaves a hole in the heap. PYTHONUNBUFFERED: a log line is out before a crash is.
# ATTNSERVE_HOST: inside a container loopback would answer nobody; what is published decides who gets in.
ENV ATTNSERVE_HOST=0.0.0.0 \
    ATTNSERVE_REPOSITORY=/models \
    MALLOC_MMAP_THRESHOLD_=131072 \
    MALLOC_TRIM_THRESHOLD_=131072 \
    PATH=/opt/attnserve/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="attnserve" \
      org.opencontainers.image.description="Serves ONNX attention models over gRPC, and says where they looked" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Mount the model repository here, read-only.
WORKDIR /models
# A number, so that an orchestrator can see that it is not root.
USER 65532:65532
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
# Loading and warming up is no failure: a server that starts has a minute before an unready answer counts. The probe
# is a module of the standard library alone: `attnserve-server healthcheck` asks the same for ten times the CPU.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-m", "attnserve_server.observability.probe"]
ENTRYPOINT ["attnserve-server"]
CMD ["serve"]

FROM runtime AS gpu
# A GPU image that quietly serves from the CPU is a fault: refuse to start instead. The driver comes from the host; CUDA
# lies among the Python packages, from where the engine loads it.
ENV ATTNSERVE_REQUIRE_PROVIDER=CUDAExecutionProvider \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
COPY --from=build-gpu /opt/attnserve /opt/attnserve

FROM runtime AS cpu
COPY --from=build-cpu /opt/attnserve /opt/attnserve
