"""The recipe shared by the tests of training: a few steps of the quickstart."""

TINY = """
base: quickstart
run: tiny
stages:
  align:
    data: {name: digit_scenes, train_size: 64}
    batch: 8
    duration: 2ba
    warmup: 0ba
    checkpoint: 1ba
  finetune:
    data: {name: digit_scenes, train_size: 64}
    batch: 8
    duration: 4ba
    warmup: 0ba
    checkpoint: 1ba
evaluation:
  data: {name: digit_scenes, test_size: 10}
"""
