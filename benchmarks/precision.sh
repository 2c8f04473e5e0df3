#!/usr/bin/env bash
# Does bf16 train as well as fp32? Stage one and two on the simulated slices of `make demo`, seeds 0, 1 and 2.
#
#     bash benchmarks/precision.sh OUT
#
# Data lies in OUT/data, each run in OUT/<precision>/<seed>; ends with the table of both precisions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?where the runs go}
python=.venv/bin/python
shared=(--data "$out/data" --tiles "$out/tiles" --panels "$out/panels")
one=(--image_encoder test_vit --image_size 64 --image_weights none --gene_depth 1 --gene_width 64 --gene_heads 1
  --gene_tokens 16 --fusion_blocks 1 --width 128 --queue_size 256 --Init_lr 1e-3 --Epoch 12)
two=(--decoder_layers 2 --decoder_width 32 --Init_lr 1e-3 --Epoch 15)
if [ ! -e "$out/panels" ]; then
  $python -m utils.simulation --out "$out/data" --patients 6 --spots 300 --genes 600 --seed 0
  $python image_tilling.py "${shared[@]}" --tile_px 64
  $python make_decoder_data.py "${shared[@]}" --n_input_genes 600
fi
for seed in 0 1 2; do
  for precision in fp32 bf16; do
    run="$out/$precision/$seed"
    encoder=(--encoder "$run/encoder_model/best_epoch_weights.pth")
    both=("${shared[@]}" --seed "$seed" --precision "$precision")
    if [ -e "$run/results/similarity/metrics.json" ]; then continue; fi
    $python train_mymodel.py "${both[@]}" "${one[@]}" --out "$run/encoder_model" --logs "$run/logs"
    $python train_decoder.py "${both[@]}" "${two[@]}" "${encoder[@]}" --out "$run/decoder_model" --logs "$run/logs"
    $python get_accuracy_image.py "${both[@]}" "${encoder[@]}" --out "$run/results/retrieval"
    $python decoder_similarity.py "${both[@]}" --decoder "$run/decoder_model/best_epoch_weights.pth" \
      --out "$run/results/similarity"
  done
done
for precision in fp32 bf16; do
  echo "-- $precision"
  $python -m utils.report "$out/$precision"/*/results
done
