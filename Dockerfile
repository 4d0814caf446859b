# The Chorus server with its bundled model and adapters. docs/operations.md says how to build and run it.
#
#   BASE_IMAGE      Debian, or anything with apt; Python 3.11 or newer is taken as it is, or installed
#   TORCH           cpu | cuda. The wheels of torch carry CUDA: `cuda` adds only the C compiler that Triton calls
#   PIP_EXTRA_ARGS  for every pip call, for example an index of torch's CPU wheels
#   secret `pip`    a pip.conf for the build alone (private index, credentials); never stored in a layer
ARG BASE_IMAGE=debian:bookworm-slim


FROM ${BASE_IMAGE} AS build
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

# hadolint ignore=DL3008  # the base image says which release; pins here would only miss its security updates
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && { python3 -m ensurepip --version || apt-get install -y --no-install-recommends python3-venv; } \
    && python3 -m venv /opt/venv \
    && rm -rf /var/lib/apt/lists/*

# The dependencies come first, in a layer of their own: a change of the source does not fetch torch again.
WORKDIR /src
COPY pyproject.toml constraints.txt ./
ARG PIP_EXTRA_ARGS=""
# hadolint ignore=SC2086  # several arguments, so split at spaces on purpose
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
               print(*project['dependencies'], *project['optional-dependencies']['otel'], sep='\n')" > dependencies.txt \
    && pip install $PIP_EXTRA_ARGS --constraint constraints.txt --requirement dependencies.txt

ARG TORCH=cpu
RUN python -c "import sys, torch; wanted, cuda = sys.argv[1], torch.version.cuda; \
               assert wanted in ('cpu', 'cuda'), f'TORCH={wanted}: cpu or cuda'; \
               assert wanted == 'cpu' or cuda, 'TORCH=cuda, but pip found a build of torch without CUDA'; \
               wanted == 'cpu' and cuda and print('WARNING: this CPU image carries CUDA', cuda, 'as well,', \
                   'several GB that nothing uses: name an index of CPU wheels in PIP_EXTRA_ARGS')" "$TORCH"

COPY setup.py README.md LICENSE ./
COPY server server
# setup.py makes the compiled kernels optional; in the image they are not.
# hadolint ignore=SC2086
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install $PIP_EXTRA_ARGS --no-deps . \
    && python -P -c "from server.devices.cpu.native import library; assert library(), 'the CPU kernels do not load'"


FROM ${BASE_IMAGE} AS runtime
ARG TORCH=cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && { command -v python3 || apt-get install -y --no-install-recommends python3; } \
    && if [ "$TORCH" = cuda ]; then \
           apt-get install -y --no-install-recommends gcc libc6-dev \
           && include="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')" \
           && { test -e "$include/Python.h" || apt-get install -y --no-install-recommends python3-dev; }; \
       fi \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 chorus \
    && useradd --uid 10001 --gid chorus --home-dir /data --no-create-home --shell /usr/sbin/nologin chorus \
    && install --directory --owner=chorus --group=chorus /data

COPY --from=build /opt/venv /opt/venv
COPY models /app/models
COPY adapters /app/adapters
RUN chmod --recursive a+rX /app

# Everything that is written lies under /data: the registry (XDG_DATA_HOME, one folder for each base model),
# models from the hub, Triton's compiled kernels. The rest of the file system can be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    XDG_DATA_HOME=/data \
    HF_HOME=/data/huggingface \
    TRITON_HOME=/data \
    CHORUS_MODEL=/app/models/chorus-tiny \
    CHORUS_ADAPTERS=/app/adapters \
    CHORUS_HOST=0.0.0.0 \
    CHORUS_PORT=8000

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Chorus" \
      org.opencontainers.image.description="Multi-LoRA inference server: one frozen base model, thousands of adapters, one batch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER 10001:10001
WORKDIR /app
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; face = http.client.HTTPConnection('127.0.0.1', int(os.environ['CHORUS_PORT']), timeout=4); face.request('GET', '/health/ready'); sys.exit(face.getresponse().status != 200)"]
ENTRYPOINT ["chorus"]
CMD ["serve"]
