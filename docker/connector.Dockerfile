# A hospital's connector: the network, and no image. Built from the root of the checkout:
#   docker build -f docker/connector.Dockerfile -t fedward-connector:0.1.0 .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# pip stays behind in an environment of its own.
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/fedward
COPY constraints.txt docker/requirements/connector.txt ./
RUN /pip/bin/pip --python /opt/fedward/bin/python install --requirement connector.txt
COPY . .
# Flower's installer of dependencies at run time is not used, so it stays behind too.
RUN /pip/bin/pip --python /opt/fedward/bin/python install --no-deps . \
 && /pip/bin/pip --python /opt/fedward/bin/python uninstall --yes uv

FROM ${BASE}
# The same numbers as in the trainer's image: the two meet in the socket's folder.
RUN groupadd --gid 10000 fedward-link \
 && useradd --uid 10001 --gid fedward-link --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin fedward-trainer \
 && useradd --uid 10002 --gid fedward-link --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin fedward-connector \
 && install -d -o fedward-connector -g fedward-link -m 0700 /var/lib/fedward/connector \
 && install -d -o fedward-trainer -g fedward-link -m 0750 /run/fedward \
 && install -d /etc/fedward \
 && rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip \
      /usr/local/bin/pip*
COPY --from=build /opt/fedward /opt/fedward
ENV PATH=/opt/fedward/bin:/usr/local/bin:/usr/bin:/bin FEDWARD_SITE=/etc/fedward/site.toml \
    FLWR_TELEMETRY_ENABLED=0 HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10002:10000
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
  CMD ["fedward-client", "health", "connector"]
ENTRYPOINT ["fedward-client"]
CMD ["connector"]
