"""A simulated cluster of any size, driven by the real router: index, policy, load book.

python -m bench.simulate run --trace conversation_trace.jsonl --policy cost --workers 8 --load 0.7 --json out.json
python -m bench.simulate run --sessions 500 --prefill 4 --decode 12 --rate 20 --fault death,30,10,2
"""

from bench.simulate.commands import main

main()
