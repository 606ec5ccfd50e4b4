# Ambidex in a container; docs/operations.md ("In a container") says how to run it.
#
#   docker build -t ambidex -t ambidex:cpu .             the CPU image, which is the last stage
#   docker build -t ambidex:cuda --target cuda .         for NVIDIA GPUs
#
# The base is pinned by its dated tag. To pin it by content as well, build with
# --build-arg DEBIAN=debian@sha256:..., the digest that this prints:
#   docker buildx imagetools inspect debian:bookworm-20250520-slim
ARG DEBIAN=debian:bookworm-20250520-slim

# Debian's Python, and a C compiler: the CPU kernels are compiled for the processor that they run
# on, and so are Triton's launchers, so neither can be compiled here.
FROM ${DEBIAN} AS system
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get upgrade --yes \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3.11 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log

# An empty environment without pip, which stays behind in this stage.
FROM system AS environment
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip \
    && python3.11 -m venv --without-pip /opt/ambidex
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_PYTHON=/opt/ambidex/bin/python \
    PIP_ROOT_USER_ACTION=ignore

# The libraries have a layer of their own, which changes only with this list and their versions.
FROM environment AS requirements
ARG EXTRAS="otel"
WORKDIR /build
COPY pyproject.toml ./
RUN python3.11 -c "import sys, tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = [project['optional-dependencies'][name] for name in sys.argv[1:]]; \
    print(*project['dependencies'], *sum(extras, []), sep='\n')" ${EXTRAS} > requirements.txt

# No Triton (0.7 GB): without a GPU nothing calls its kernels. Nor torch's own tests (0.1 GB).
FROM environment AS libraries-cpu
WORKDIR /build
COPY constraints.txt ./
COPY --from=requirements /build/requirements.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --index-url "${TORCH_INDEX}" --constraint constraints.txt torch \
    && grep -v '^triton' requirements.txt > cpu.txt \
    && pip install --constraint constraints.txt --requirement cpu.txt \
    && cd /opt/ambidex/lib/python3.11/site-packages/torch \
    && rm -rf test bin/*[Tt]est*

FROM environment AS libraries-cuda
WORKDIR /build
COPY constraints.txt ./
COPY --from=requirements /build/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --requirement requirements.txt \
    && /opt/ambidex/bin/python -c "import torch; assert torch.version.cuda, 'torch came without CUDA'" \
    && cd /opt/ambidex/lib/python3.11/site-packages/torch \
    && rm -rf test bin/*[Tt]est*

# Ambidex itself, below /app: what changes with every commit is a small layer.
FROM environment AS application
WORKDIR /build
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_CONSTRAINT=constraints.txt pip install --no-deps --root /app .

# What both images are but for their libraries.
FROM system AS runtime
RUN groupadd --gid 10001 ambidex \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home \
        --shell /usr/sbin/nologin ambidex \
    && install --directory --owner 10001 --group 10001 /cache /models
ENV PATH=/opt/ambidex/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    AMBIDEX_HOST=0.0.0.0 \
    AMBIDEX_WATCH=/models \
    AMBIDEX_CACHE=/cache/ambidex \
    TRITON_CACHE_DIR=/cache/triton \
    XDG_CACHE_HOME=/cache
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="ambidex" \
      org.opencontainers.image.description="Language models that run dense or as a sparse mixture of experts" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
USER 10001:10001
# Where `ambidex train` leaves its runs unless it is told otherwise.
WORKDIR /models
VOLUME ["/models", "/cache"]
EXPOSE 8000
# SIGTERM drains: give `docker stop` more time than AMBIDEX_DRAIN_TIMEOUT (30 s).
STOPSIGNAL SIGTERM
# Not /health: a server that drains or replaces its model must not be restarted for that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m --retries=3 CMD ["python", "-c", \
    "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('AMBIDEX_PORT', '8000')), timeout=4); c.request('GET', '/health/live'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["ambidex"]
CMD ["serve"]

# Triton compiles its launchers against Python's headers. NVIDIA_* are for NVIDIA's container runtime.
FROM runtime AS cuda
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libpython3.11-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
USER 10001:10001
ENV AMBIDEX_DEVICE=cuda \
    CUDA_CACHE_PATH=/cache/cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
COPY --from=libraries-cuda /opt/ambidex /opt/ambidex
COPY --from=application /app/opt/ambidex /opt/ambidex
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"

FROM runtime AS cpu
COPY --from=libraries-cpu /opt/ambidex /opt/ambidex
COPY --from=application /app/opt/ambidex /opt/ambidex
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
