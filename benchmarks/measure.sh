#!/usr/bin/env bash
# One part of the measurements, on a machine with a GPU (or several, which the ranks then share out):
#
#     bash benchmarks/measure.sh PART OUTPUT_FOLDER LLAMA3_TOKENIZER_FOLDER COMMIT
#
# tests         every test that needs a GPU                                            (1 GPU)
# load          loading 70B in NF4 from a cold disk, beside a plain read               (1 GPU of 80 GB)
# 70b           tiers of 70B QLoRA on one rank                                         (1 GPU of 80 GB)
# 70b-two-gpus  tiers of 70B QLoRA on two ranks                                        (2 GPUs of 40 GB)
# 8b            tiers of 8B QLoRA and LoRA                                             (1 GPU of 80 GB)
# 8b-full       8B, every weight, on 1 (offloaded), 2 and 4 ranks                     (2 GPUs of 80 GB)
# 70b-fewer-layers   70B LoRA and full at full width, for the bytes of a layer         (2 GPUs of 80 GB)
# same-losses   8B on 1 and 4 ranks, offloaded or not: the same losses                 (1 GPU of 80 GB)
#
# Each takes less than ten minutes. The checkpoints are random, of the true shape, and stay in /tmp for the next part.
set -euo pipefail
usage() { sed -n '2,15p' "$0" >&2; exit 2; }
[ $# = 4 ] || usage
part=$1 output=$2 tokenizer=$3 commit=$4
cd "$(dirname "$0")/.."
export FITUNE_LLAMA3_TOKENIZER=$tokenizer NCCL_SOCKET_NTHREADS=4 NCCL_NSOCKS_PERTHREAD=4

checkpoint() {  # FOLDER SHAPE FORMAT [LAYERS]
  [ -e "$1/config.json" ] || python3 benchmarks/random_checkpoint.py "$1" --shape "$2" --format "$3" \
    --tokenizer "$tokenizer" ${4:+--layers "$4"}
}

[ -e /tmp/data/report.json ] || python3 cli.py prepare --dataset examples/instructions/instructions.jsonl \
  --tokenizer "$tokenizer" --template plain --max-length 3072 --output /tmp/data >/dev/null
case $part in
  tests) python3 -m pytest -m gpu -n 4 -q -rP -p no:cacheprovider tests/test_gpu.py; exit ;;
  load)
    checkpoint /tmp/70b-nf4 70b nf4
    python3 benchmarks/load.py /tmp/70b-nf4 "$output/load-70b.json" --commit "$commit" --recipe llama3_70b_qlora \
      --profile fsdp_1x48gb
    exit ;;
  70b) checkpoint /tmp/70b-nf4 70b nf4 ;;
  70b-two-gpus) checkpoint /tmp/70b-nf4 70b nf4 ;;
  8b) checkpoint /tmp/8b-nf4 8b nf4; checkpoint /tmp/8b-bf16 8b bf16 ;;
  8b-full) checkpoint /tmp/8b-bf16 8b bf16 ;;
  70b-fewer-layers)
    for layers in 2 3 4; do checkpoint /tmp/70b-bf16-$layers 70b bf16 $layers; done ;;
  same-losses)
    checkpoint /tmp/8b-nf4 8b nf4
    python3 benchmarks/same_losses.py "$output/same-losses.json" --commit "$commit" --recipe llama3_8b_qlora \
      --reference single_gpu --compare fsdp_offload_1x24gb fsdp_4x24gb fsdp_offload_4gpu --cap-gib 19 \
      --set base.model=/tmp/8b-nf4 --set data.prepared=/tmp/data --set max_length=1536
    exit ;;
  *) usage ;;
esac
python3 benchmarks/tiers.py "benchmarks/plans/$part.json" "$output" --commit "$commit"
