"""Ranks, links and the bytes that cross them: the only room that imports torch.distributed."""
