"""LoRA and its relatives: layers, files, merging, fusing, export."""
