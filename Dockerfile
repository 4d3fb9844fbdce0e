# An image for all pods of a job: docs/kubernetes.md
#
#   docker build --build-arg TORCH=cpu --tag stillhouse:0.1.0-cpu .
#   docker build --build-arg TORCH=cuda --tag stillhouse:0.1.0-cuda .
#
# TORCH=cuda takes the wheel of PyPI, built for CUDA 13.0, which brings CUDA's libraries with it
# (the nodes need an NVIDIA driver 580 or newer). No nvcc is needed: the optimizer and the kernels are
# torch's, and Triton needs a C compiler only.

FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/stillhouse \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    TORCH_EXTENSIONS_DIR=/opt/torch-extensions \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/stillhouse

# The packages, as requirements.lock has them.
FROM base AS packages
ARG TORCH=cpu
RUN python -m venv /opt/venv
COPY pyproject.toml requirements.lock README.md ./
RUN case "$TORCH" in \
        cpu) build="+cpu"; index="https://download.pytorch.org/whl/cpu" ;; \
        cuda) build=""; index="https://pypi.org/simple" ;; \
        *) echo "TORCH: got $TORCH; may be cpu or cuda" >&2; exit 2 ;; \
    esac \
    && torch="$(grep '^torch==' requirements.lock)" \
    && pip install --constraint requirements.lock --extra-index-url "$index" "$torch$build"
# Editable: the code is found at PYTHONPATH, and changes to it leave this layer as it is.
RUN pip install --constraint requirements.lock --editable '.[s3,tasks]'

FROM base AS job
ARG TORCH=cpu
# g++: torch asks for it when it loads DeepSpeed's op, Triton when it compiles a kernel.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 stillhouse \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash stillhouse \
    && install --directory --owner 1000 --group 1000 /opt/torch-extensions
COPY --from=packages /opt/venv /opt/venv
# Before the rest of the code, which changes more often than this takes minutes.
COPY trainer/__init__.py trainer/imports.py trainer/compiled_ops.py trainer/
USER 1000:1000
RUN if [ "$TORCH" = cpu ]; then python -m trainer.compiled_ops; fi
COPY pyproject.toml requirements.lock README.md ./
COPY jobs jobs
COPY trainer trainer
COPY quant quant
COPY cluster cluster
# As `make setup` does: the op for quantized layers on CPUs, and what numba compiles.
RUN python -m jobs.build_kernels
# As a command: docker run --rm stillhouse:0.1.0-cpu schema. KubeRay has commands of its own.
CMD ["python", "-m", "jobs", "--help"]
