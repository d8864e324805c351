"""What the tests and the demo share: tiny checkpoints, adapters, the PEFT reference, engines."""
