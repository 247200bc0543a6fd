# A hospital's trainer: the images, and no network. Built from the root of the checkout:
#   docker build -f docker/trainer.Dockerfile -t fedward-trainer:0.1.0 .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Where torch comes from; empty: the index that pip knows, on Linux a build for CUDA. For another
# CUDA or for the CPU alone, name the index that pytorch.org tells.
ARG TORCH_INDEX=
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# pip stays behind in an environment of its own.
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/fedward
COPY constraints.txt docker/requirements/trainer.txt ./
RUN if [ -n "${TORCH_INDEX}" ]; then \
      /pip/bin/pip --python /opt/fedward/bin/python install --index-url "${TORCH_INDEX}" torch; \
    fi \
 && /pip/bin/pip --python /opt/fedward/bin/python install --requirement trainer.txt
COPY . .
RUN /pip/bin/pip --python /opt/fedward/bin/python install --no-deps .

FROM ${BASE}
# The same numbers as in the connector's image: the two meet in the socket's folder.
RUN groupadd --gid 10000 fedward-link \
 && useradd --uid 10001 --gid fedward-link --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin fedward-trainer \
 && install -d -o fedward-trainer -g fedward-link -m 0700 /var/lib/fedward/trainer \
 && install -d -o fedward-trainer -g fedward-link -m 0750 /run/fedward \
 && install -d /etc/fedward /data/images \
 && rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip \
      /usr/local/bin/pip*
COPY --from=build /opt/fedward /opt/fedward
ENV PATH=/opt/fedward/bin:/usr/local/bin:/usr/bin:/bin FEDWARD_SITE=/etc/fedward/site.toml \
    HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10000
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
  CMD ["fedward-client", "health", "trainer"]
ENTRYPOINT ["fedward-client"]
CMD ["trainer"]
