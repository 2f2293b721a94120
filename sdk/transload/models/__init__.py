"""Facts about model families, without torch: dimensions, roles of tensors, fused members."""
