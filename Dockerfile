# The server's image. `--target cpu` (the default) carries onnxruntime, `--target gpu` carries onnxruntime-gpu and the
# CUDA libraries it needs; never both, because the two overwrite each other's files. Any Debian-like image with Python
# 3.11 or newer and its venv module works as BASE_IMAGE. All stages use it, so the copied environment finds its Python.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Bytecode is compiled here, because the root is read-only at run time. pip is in a separate environment that the final
# stages do not copy. PIP_CONSTRAINT, unlike -c, also applies to the build of the wheel.
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/attnserve
# Install the dependencies first, from the metadata and empty packages, so that a code change downloads nothing.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY deploy/pypi_readme.py deploy/pypi_readme.py
RUN mkdir -p client/attnserve_client proto/attnserve server/attnserve_server

FROM build AS build-gpu
RUN /opt/pip/bin/pip --python /opt/attnserve/bin/python3 install ".[otel,server-gpu]" "onnxruntime-gpu[cuda,cudnn]"
COPY client/attnserve_client client/attnserve_client
COPY proto/attnserve proto/attnserve
COPY server/attnserve_server server/attnserve_server
RUN /opt/pip/bin/pip --python /opt/attnserve/bin/python3 install --no-deps --force-reinstall .

FROM build AS build-cpu
RUN /opt/pip/bin/pip --python /opt/attnserve/bin/python3 install ".[otel,server]"
COPY client/attnserve_client client/attnserve_client
COPY proto/attnserve proto/attnserve
COPY server/attnserve_server server/attnserve_server
RUN /opt/pip/bin/pip --python /opt/attnserve/bin/python3 install --no-deps --force-reinstall .

FROM ${BASE_IMAGE} AS runtime
# MALLOC_*: fixed thresholds of 128 KiB make glibc return freed memory after a burst of large replies, and keep large
# maps from fragmenting the heap. PYTHONUNBUFFERED: log lines are written before a crash loses them.
# ATTNSERVE_HOST: loopback inside a container is unreachable. So `serve` needs TLS and a check of callers, or
# ATTNSERVE_INSECURE=true, which the image does not set.
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
      org.opencontainers.image.description="Serve ONNX attention models over gRPC, with attention weights on request" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Mount the model repository here, read-only.
WORKDIR /models
# A number, so that an orchestrator can verify that it is not root.
USER 65532:65532
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
# Loading and warm-up may take a minute before an unready response counts as a failure. The probe imports the standard
# library alone: `attnserve-server healthcheck` does the same for ten times the CPU time.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-m", "attnserve_server.observability.probe"]
ENTRYPOINT ["attnserve-server"]
CMD ["serve"]

FROM runtime AS gpu
# Refuse to start where the GPU cannot be used, instead of serving from the CPU. The driver comes from the host; the
# engine loads CUDA from the Python packages.
ENV ATTNSERVE_REQUIRE_PROVIDER=CUDAExecutionProvider \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
COPY --from=build-gpu /opt/attnserve /opt/attnserve

FROM runtime AS cpu
COPY --from=build-cpu /opt/attnserve /opt/attnserve
