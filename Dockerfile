# The image of all steps, in two targets: `cpu`, without CUDA, and `gpu`, the same and CUDA's libraries.
#   docker build --target cpu --build-arg GIT_COMMIT="$(git rev-parse HEAD)" --tag braintumor:TAG .
# Settings of a package index of your own stay out of every layer: --secret id=pip,src=pip.conf
ARG BASE=python:3.11-slim-bookworm

# pip stands beside the environment that it fills: what is shipped holds no installer.
FROM ${BASE} AS pip
RUN python3.11 -m venv /opt/pip && python3.11 -m venv --without-pip /opt/braintumor
ENV PIP_PYTHON=/opt/braintumor/bin/python PIP_DISABLE_PIP_VERSION_CHECK=1

FROM pip AS requirements
COPY requirements/run.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip install --no-cache-dir --no-compile --require-hashes -r /build/run.txt

FROM requirements AS package
WORKDIR /build
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY braintumor braintumor
COPY components components
COPY pipelines pipelines
RUN /opt/pip/bin/pip install --no-index --no-deps --no-build-isolation --no-compile --prefix /opt/package . \
    && python3.11 -m compileall -q --invalidation-mode unchecked-hash /opt/package

# Compiled once, here: where the steps run, the root file system may be read-only.
# The headers are for compiling new operations, and 430 MB.
FROM requirements AS environment
RUN /opt/pip/bin/pip uninstall --yes hatchling editables pluggy trove-classifiers \
    && /opt/pip/bin/pip check \
    && rm -r /opt/braintumor/lib/python3.11/site-packages/tensorflow/include \
    && python3.11 -m compileall -q --invalidation-mode unchecked-hash /opt/braintumor/lib

# All else of gpu.txt is there already, in the same versions: what lands in the prefix is CUDA alone.
FROM requirements AS cuda
COPY requirements/gpu.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip install --no-cache-dir --no-compile --require-hashes --prefix /opt/cuda -r /build/gpu.txt \
    && python3.11 -m compileall -q --invalidation-mode unchecked-hash /opt/cuda

FROM ${BASE} AS runtime
# The base image brings an installer too. The folder belongs to group 0: some clusters choose a user of their own, in
# it.
RUN rm -rf /usr/local/bin/pip* /usr/local/bin/wheel \
        /usr/local/lib/python3.11/ensurepip /usr/local/lib/python3.11/site-packages/* \
    && groupadd --gid 10001 braintumor \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin braintumor \
    && install --directory --owner 10001 --group 0 --mode 0775 /work
# Caches follow HOME: /tmp can be written whoever the user is and however read-only the rest.
# LOGNAME is for MLflow, which asks for a name that a user of the cluster's choice doesn't have.
ENV PATH=/opt/braintumor/bin:${PATH} HOME=/tmp LOGNAME=braintumor \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MLFLOW_DISABLE_TELEMETRY=true DVC_NO_ANALYTICS=1
WORKDIR /work
COPY --from=environment /opt/braintumor /opt/braintumor
USER 10001:10001
# No ENTRYPOINT: `docker run IMAGE braintumor train ...` reads as it is typed, and Kubeflow brings a command of its own.
CMD ["braintumor", "--help"]

FROM runtime AS cpu
COPY --from=package /opt/package /opt/braintumor
COPY params params
ARG GIT_COMMIT
RUN test -n "${GIT_COMMIT}" || { echo "Error: GIT_COMMIT is empty; add --build-arg GIT_COMMIT=..." >&2; exit 1; } \
    && braintumor --help >/dev/null \
    && python3 -c "import braintumor, components, pipelines" \
    && python3 -c "import boto3, great_expectations, kfp.kubernetes, mlflow, tensorflow" \
    && rm -rf /tmp/* /tmp/.[!.]*
LABEL org.opencontainers.image.revision=${GIT_COMMIT}
ENV BRAINTUMOR_GIT_COMMIT=${GIT_COMMIT}

FROM runtime AS runtime-gpu
COPY --from=cuda /opt/cuda /opt/braintumor
# Which GPUs a container sees is the cluster's to say: named here, one that asked for none would see all of the node's.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime-gpu AS gpu
COPY --from=package /opt/package /opt/braintumor
COPY params params
ARG GIT_COMMIT
RUN test -n "${GIT_COMMIT}" || { echo "Error: GIT_COMMIT is empty; add --build-arg GIT_COMMIT=..." >&2; exit 1; } \
    && braintumor --help >/dev/null \
    && python3 -c "import braintumor, components, pipelines" \
    && python3 -c "import boto3, great_expectations, kfp.kubernetes, mlflow, tensorflow" \
    && rm -rf /tmp/* /tmp/.[!.]*
LABEL org.opencontainers.image.revision=${GIT_COMMIT}
ENV BRAINTUMOR_GIT_COMMIT=${GIT_COMMIT}
