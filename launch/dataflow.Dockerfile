# The image of Dataflow's workers (docs/launch.md): Beam's, of the version that setup.py allows, with this project.
#
#   git archive HEAD | docker build --file=launch/dataflow.Dockerfile --tag=IMAGE -
FROM apache/beam_python3.12_sdk:2.77.0
COPY . /opt/dreamllm_jax
RUN python -m pip install --no-cache-dir "/opt/dreamllm_jax[beam,gcs]" "apache-beam==2.77.0"
