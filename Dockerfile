# lit-vapo in a container: `docker build -t lit-vapo .`, for a CPU with `--build-arg TORCH=cpu`. README.md has how to run
# it, docs/cloud.md has the rest. It runs as any user, on a read-only root with a tmpfs at /tmp.
#
# Behind a package mirror, pass pip's own settings as build arguments (PIP_INDEX_URL, …). Those that hold a password go in
# a secret, as does the certificate of a proxy; secrets stay out of the image:
#   docker build --secret id=pip_conf,src=$HOME/.config/pip/pip.conf --secret id=pip_cert,src=ca.pem .
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build

# cuda: torch as locks/cuda.txt has it, with CUDA libraries. cpu: its CPU build, of the version in constraints-cpu.txt.
ARG TORCH=cuda
# The index torch's CPU build comes from, in addition to pip's own. Empty where pip's own index has CPU builds.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src

# The dependencies change seldom and weigh gigabytes: they get a layer of their own, before any of our code. Every file
# has the digest that `make lock` noted; a CPU's torch alone has its version.
COPY constraints-cpu.txt ./
COPY locks locks
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=pip_cert,target=/etc/pip_cert.pem \
    if [ -s /etc/pip_cert.pem ]; then export PIP_CERT=/etc/pip_cert.pem; fi \
    && case "$TORCH" in \
        cpu) \
            grep '^torch==' constraints-cpu.txt >torch.txt \
            && pip install --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r torch.txt \
            && cp locks/common.txt locked.txt ;; \
        cuda) cat locks/common.txt locks/cuda.txt >locked.txt ;; \
        *) echo "TORCH: expected cuda or cpu, got $TORCH" >&2; exit 1 ;; \
    esac \
    && pip install --no-deps --require-hashes --only-binary :all: -r locked.txt

COPY pyproject.toml README.md LICENSE ./
COPY lit_vapo lit_vapo
# Nothing is fetched for it: setuptools is among the locked.
RUN pip install --no-deps --no-build-isolation . \
    && pip check


FROM python:${PYTHON_VERSION}-slim-bookworm

ARG REVISION=unknown
LABEL org.opencontainers.image.title="lit-vapo" \
      org.opencontainers.image.description="Reward-model ensembles and variance-aware PPO on Lightning" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:${PYTHON_VERSION}-slim-bookworm"

# torch.compile and Triton write C and C++ at run time; W&B notes the commit of a mounted working tree; an init passes
# signals on and buries the dead. Debian keeps one version of each in a release: a pin would fail at its next repair.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git tini \
    && rm -rf /var/lib/apt/lists/*

# Open to any user, so that `docker run --user "$(id -u):$(id -g)"` can write; new volumes begin as copies of these.
RUN useradd --no-create-home --uid 1000 vapo \
    && mkdir -p /cache/huggingface /workspace/runs /models \
    && chmod 1777 /cache /cache/huggingface /workspace /workspace/runs

COPY --from=build /opt/venv /opt/venv
COPY configs /workspace/configs
COPY --chmod=755 deploy/healthcheck.sh /usr/local/bin/healthcheck

# USER: who has no line in /etc/passwd has no name, and torch asks for one. LIT_VAPO_MODELS: docs/runs.md.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=vapo \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    LIT_VAPO_MODELS=/models:/workspace \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

VOLUME ["/cache", "/workspace/runs"]
WORKDIR /workspace
USER 1000
HEALTHCHECK --interval=60s --timeout=30s --start-period=120s CMD ["healthcheck"]
ENTRYPOINT ["tini", "--", "lit-vapo"]
CMD ["--help"]
