"""Prompts for benchmarks: short tasks whose answers are written out step by step."""

TASKS = (
    "A baker sells rolls at 3 for 2 euros and loaves at 4 euros each. On Monday she takes 96 euros "
    "and sells twice as many loaves as packs of rolls. How many loaves does she sell?",
    "Find all integers n for which n squared plus 5n plus 6 is divisible by 12. Explain each step.",
    "A train leaves at 8:15 and travels 210 km at 84 km/h, waits 25 minutes, and returns at 70 "
    "km/h. When is it back?",
    "Prove that among any seven whole numbers there are two whose difference is divisible by six.",
    "How many four-digit numbers have digits that add up to nine? Count them in two ways.",
    "A rectangle's sides are whole numbers and its area equals its perimeter. Find all of them.",
    "Explain how the sieve of Eratosthenes works and list the primes below one hundred with it.",
    "Three dice are thrown. What is the probability that the largest number shown is exactly five?",
)


def chat_prompts(count: int) -> list[str]:
    """Returns `count` prompts, all different, in the chat format of SmolLM2."""
    prompts = []
    for number in range(count):
        task = f"Exercise {number + 1}. {TASKS[number % len(TASKS)]}"
        prompts.append(f"<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n")
    return prompts
