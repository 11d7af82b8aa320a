# Images of azu's three programs. One file, three targets:
#
#   docker build --target bootstrap   -t azu-bootstrap .
#   docker build --target coordinator -t azu-coordinator .
#   docker build --target node        -t azu-node .     (--build-arg PIP_EXTRA_INDEX_URL=... for another build of torch)
#
#   docker run -p 4001:4001 -v azu-bootstrap:/data azu-bootstrap
#   docker run --gpus all -v azu-node:/data azu-node join /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...
#
# /data holds the identity key and what was fetched: keep it in a volume. Settings come as AZU_* variables too.

FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgmp-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/azu
ENV PATH=/opt/azu/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./

FROM build AS build-source
COPY pyproject.toml README.md LICENSE ./
COPY azu azu
COPY node node
COPY coordinator coordinator
COPY bootstrap bootstrap

FROM build-source AS build-bootstrap
RUN pip install -c constraints.txt .

FROM build-source AS build-coordinator
RUN pip install -c constraints.txt '.[coordinator]'

# torch comes before the sources: it is large, and a change of ours must not fetch it again.
FROM build AS build-node
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c constraints.txt torch==2.13.0
COPY --from=build-source /src /src
RUN pip install -c constraints.txt '.[node]'

FROM python:3.11-slim-bookworm AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgmp10 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home azu \
    && install -d -o azu -g azu -m 0700 /data
ENV PATH=/opt/azu/bin:$PATH PYTHONUNBUFFERED=1 AZU_DATA_DIR=/data AZU_LOG_JSON=true
USER azu
WORKDIR /data
VOLUME ["/data"]
STOPSIGNAL SIGTERM

FROM runtime AS bootstrap
COPY --from=build-bootstrap /opt/azu /opt/azu
EXPOSE 4001
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 4001), 3).close()"]
ENTRYPOINT ["azu-bootstrap"]
CMD ["run"]

FROM runtime AS coordinator
COPY --from=build-coordinator /opt/azu /opt/azu
ENV AZU_HOST=0.0.0.0 AZU_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=3)"]
ENTRYPOINT ["azu-coordinator"]
CMD ["serve"]

FROM runtime AS node
COPY --from=build-node /opt/azu /opt/azu
ENV AZU_LISTEN=/ip4/0.0.0.0/tcp/4001
EXPOSE 4001
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 4001), 3).close()"]
ENTRYPOINT ["azu-node"]
CMD ["join"]
