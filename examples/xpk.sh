#!/usr/bin/env bash
# The same slice by xpk, on a cluster that it made: CLUSTER=... PROJECT=... ZONE=... IMAGE=... BUCKET=... bash examples/xpk.sh
# IMAGE has rfl_jax[tpu,gcs] installed, and clips, tokenizer and face networks under /data.
set -euo pipefail
xpk workload create \
    --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --workload=rfl --tpu-type=v5p-16 --num-slices=1 --max-restarts=3 --docker-image="$IMAGE" \
    --command="python -m rfl_jax.train --config=wan2_2_i2v_a14b --workdir=gs://$BUCKET/run --distributed \
        --config.mesh.fsdp=1 --config.mesh.context=8 \
        --config.model_paths='[\"gs://$BUCKET/high\", \"gs://$BUCKET/low\", \"gs://$BUCKET/umt5\", \"gs://$BUCKET/vae\"]' \
        --config.tokenizer_path=/data/umt5-xxl --config.reward_model_path=/data/antelopev2 \
        --config.file_name=/data/clips/metadata.csv"
