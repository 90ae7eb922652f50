"""llama.cpp around qatlora: GGUF files, the converter of HF folders, the tools."""
