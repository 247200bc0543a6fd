# The aggregator. Built from the root of the checkout:
#   docker build -f docker/server.Dockerfile -t fedward-server:0.1.0 .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Where torch comes from; empty: the index that pip knows. The aggregator needs no GPU.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# pip stays behind in an environment of its own.
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/fedward
COPY constraints.txt docker/requirements/server.txt ./
RUN if [ -n "${TORCH_INDEX}" ]; then \
      /pip/bin/pip --python /opt/fedward/bin/python install --index-url "${TORCH_INDEX}" torch; \
    fi \
 && /pip/bin/pip --python /opt/fedward/bin/python install --requirement server.txt
COPY . .
# Flower's installer of dependencies at run time is switched off, so it stays behind too.
RUN /pip/bin/pip --python /opt/fedward/bin/python install --no-deps . \
 && /pip/bin/pip --python /opt/fedward/bin/python uninstall --yes uv

FROM ${BASE}
RUN groupadd --gid 10003 fedward-server \
 && useradd --uid 10003 --gid fedward-server --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin fedward-server \
 && install -d -o fedward-server -g fedward-server -m 0700 /var/lib/fedward-server \
 && rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip \
      /usr/local/bin/pip*
COPY --from=build /opt/fedward /opt/fedward
ENV PATH=/opt/fedward/bin:/usr/local/bin:/usr/bin:/bin \
    FEDWARD_SERVER=/var/lib/fedward-server/aggregator/server.toml \
    FLWR_TELEMETRY_ENABLED=0 HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10003:10003
EXPOSE 9443 9444 9445
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
  CMD ["fedward-server", "health"]
ENTRYPOINT ["fedward-server"]
CMD ["run"]
