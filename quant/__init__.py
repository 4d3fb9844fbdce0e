from trainer.imports import without_compiler

without_compiler()
