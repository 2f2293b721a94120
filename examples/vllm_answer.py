"""Asks a checkpoint two questions through vLLM's Python interface: does the engine load it, and does it make sense?

    VLLM_CPU_KVCACHE_SPACE=1 python examples/vllm_answer.py PATH

VLLM_CPU_KVCACHE_SPACE is in GiB. The main guard is needed: vLLM starts its engine in a second process.
"""

import sys

QUESTIONS = ("Write a Python function that reverses a string.", "What is the capital of France?")


def main(path: str) -> None:
    """Prints one greedy answer of at most 60 tokens per question."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=path, max_model_len=1024, max_num_seqs=4, enforce_eager=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for question, answer in zip(
        QUESTIONS, engine.chat(chats, SamplingParams(temperature=0, max_tokens=60)), strict=True
    ):
        print(f"\n>>> {question}\n{answer.outputs[0].text}")


if __name__ == "__main__":
    main(sys.argv[1])
