"""LoRA adapters of PEFT on PIFA layers."""
