"""What runs in each process: training, evaluation, answers."""
