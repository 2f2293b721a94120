"""Asks a GGUF file two questions through llama.cpp: does the engine load it, and does it make sense?

    python examples/llama_cpp_answer.py MODEL.gguf [TOKENS]

Runs in an environment with the package xllamacpp, which carries llama.cpp's server (ci/llama_cpp makes one).
"""

import sys

QUESTIONS = ("Write a Python function that reverses a string.", "What is the capital of France?")


def main(path: str, tokens: int = 40) -> None:
    """Prints one greedy answer per question."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 1024, 1, False
    server = xllamacpp.Server(params)
    for question in QUESTIONS:
        chat = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0}
        print(f"\n>>> {question}\n{server.handle_chat_completions(chat)['choices'][0]['message']['content']}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
