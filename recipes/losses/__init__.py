"""What a training step minimises: functions of log-probabilities, and how a microbatch's losses come to them."""
