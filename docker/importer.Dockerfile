# A hospital's importer: the PACS's network, and no ledger. Built from the root of the checkout:
#   docker build -f docker/importer.Dockerfile -t fedward-importer:0.1.0 .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# pip stays behind in an environment of its own.
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/fedward
COPY constraints.txt docker/requirements/importer.txt ./
RUN /pip/bin/pip --python /opt/fedward/bin/python install --requirement importer.txt
COPY . .
RUN /pip/bin/pip --python /opt/fedward/bin/python install --no-deps .

FROM ${BASE}
# The group of the trainer's image: its user reads what this one fetches.
RUN groupadd --gid 10000 fedward-link \
 && useradd --uid 10003 --gid fedward-link --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin fedward-importer \
 && install -d -o fedward-importer -g fedward-link -m 0700 /var/lib/fedward/importer \
 && install -d /etc/fedward /data/images \
 && rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip \
      /usr/local/bin/pip*
COPY --from=build /opt/fedward /opt/fedward
# The container makes the walls; the command only looks whether they stand.
ENV PATH=/opt/fedward/bin:/usr/local/bin:/usr/bin:/bin FEDWARD_SITE=/etc/fedward/site.toml \
    FEDWARD_WALLED=container HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10003:10000
# It fetches and ends.
HEALTHCHECK NONE
ENTRYPOINT ["fedward-client"]
CMD ["data", "fetch", "images"]
