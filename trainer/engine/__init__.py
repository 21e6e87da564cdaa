"""DeepSpeed engines, optimizer, averages of weights, compilation."""
