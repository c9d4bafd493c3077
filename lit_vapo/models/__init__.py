"""Language models, adapters and reward models: everything that knows transformers, peft and bitsandbytes."""
