# The digits example:
#   docker build -t digits .
#   docker run -ePORT=8080 -p8080:8080 digits
# What follows the image's name are flags for the server, after the model:
#   docker run -p8080:8080 digits examples/digits/app.py:model --workers 2

FROM python:3.11-slim-bookworm AS build
RUN python -m venv /venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kserve_lite kserve_lite
RUN /venv/bin/pip install --no-cache-dir .

FROM python:3.11-slim-bookworm
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app
COPY examples/digits examples/digits
# By number, so that Kubernetes can tell that it is not root.
USER 1000:1000
EXPOSE 8080
# No shell: the server is process 1, reads $PORT itself and gets SIGTERM.
ENTRYPOINT ["kserve-lite", "run"]
CMD ["examples/digits/app.py:model"]
