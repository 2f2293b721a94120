set -uo pipefail
export LC_ALL=C
cd "$(dirname "$0")" || exit 2

failed=0
good() { printf 'ok    %s\n' "$*"; }
note() { printf 'note  %s\n' "$*"; }
bad() { printf 'FAIL  %s\n' "$*"; failed=$((failed + 1)); }
have() { command -v "$1" >/dev/null 2>&1; }

# address ADDRESS INTERFACE: this node has the address, on the interface when one is named.
address() {
  local ip found
  ip=$(getent ahosts "$1" | awk 'NR == 1 {print $1}')
  found=$(ip -o address show 2>/dev/null | awk -v ip="$ip" '{split($4, a, "/")} a[1] == ip {print $2; exit}')
  if [ -z "$ip" ]; then
    bad "address: $1 does not resolve here"
  elif [ -z "$found" ]; then
    bad "address: no interface of this node has $ip"
  elif [ -n "$2" ] && [ "$found" != "$2" ]; then
    bad "interface: $ip is on $found, the cluster file says $2"
  elif [ "$found" = lo ]; then
    bad "address: $1 is $ip here, the loopback interface, which other nodes cannot reach; see /etc/hosts"
  else
    good "address: $ip on $found"
  fi
}

# reach NODE ADDRESS
reach() {
  if ! getent ahosts "$2" >/dev/null; then
    bad "reach $1: $2 does not resolve here"
  elif ! have ping; then
    note "reach $1: not checked, there is no ping"
  elif ping -c 1 -W 3 "$2" >/dev/null 2>&1; then
    good "reach $1: $2 answers"
  else
    bad "reach $1: $2 does not answer to ping"
  fi
}

# port NUMBER: nothing listens there yet.
port() {
  if ! have ss; then
    note "port $1: not checked, there is no ss"
  elif [ -n "$(ss -Hltn "sport = :$1")" ]; then
    bad "port $1: in use"
  else
    good "port $1: free"
  fi
}

# cuda_free MIB DEVICE...: every device has the memory that the engine asks for.
cuda_free() {
  local want=$1 id free
  shift
  if ! have nvidia-smi; then
    bad "devices: nvidia-smi is not installed"
    return
  fi
  for id in "$@"; do
    free=$(nvidia-smi --id="$id" --query-gpu=memory.free --format=csv,noheader,nounits 2>/dev/null)
    if ! [ "$free" -ge 0 ] 2>/dev/null; then
      bad "device $id: not found by nvidia-smi"
    elif [ "$free" -lt "$want" ]; then
      bad "device $id: $free MiB free, the plan needs $want"
    else
      good "device $id: $free MiB free of the $want that the plan needs"
    fi
  done
}

# ascend_free MIB DEVICE...: the device files are there and the memory is free.
ascend_free() {
  local want=$1 id used total
  shift
  for id in davinci_manager devmm_svm hisi_hdc "${@/#/davinci}"; do
    [ -e "/dev/$id" ] || bad "devices: /dev/$id is missing"
  done
  if ! have npu-smi; then
    note "free memory: not checked, there is no npu-smi"
    return
  fi
  for id in "$@"; do
    # The n-th "used / total" pair of HBM in MB belongs to the n-th device.
    read -r used total < <(npu-smi info 2>/dev/null | grep -oE '[0-9]+ */ *[0-9]{5,6}' | tr '/' ' ' |
      sed -n "$((id + 1))p")
    if [ -z "${total:-}" ]; then
      bad "device $id: not found by npu-smi"
    elif [ $((total - used)) -lt "$want" ]; then
      bad "device $id: $((total - used)) MB free, the plan needs $want"
    else
      good "device $id: $((total - used)) MB free of the $want that the plan needs"
    fi
  done
}

# ascend_links DEVICE...: every device's own network port is up, has an address and finds its gateway.
ascend_links() {
  local tool id
  tool=$(command -v hccn_tool || echo /usr/local/Ascend/driver/tools/hccn_tool)
  if ! [ -x "$tool" ]; then
    note "device network: not checked, there is no hccn_tool"
    return
  fi
  for id in "$@"; do
    if ! "$tool" -i "$id" -link -g 2>&1 | grep -qi 'link status: *up'; then
      bad "device $id: its link is down (hccn_tool -i $id -link -g)"
    elif ! "$tool" -i "$id" -ip -g 2>&1 | grep -qi 'ipaddr'; then
      bad "device $id: has no address (hccn_tool -i $id -ip -g)"
    elif ! "$tool" -i "$id" -net_health -g 2>&1 | grep -qi 'success'; then
      bad "device $id: does not find its gateway (hccn_tool -i $id -net_health -g)"
    else
      good "device $id: network is up"
    fi
  done
}

# ram_free MIB
ram_free() {
  local free
  free=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' /proc/meminfo)
  if [ "$free" -lt "$1" ]; then
    bad "memory: $free MiB available, the plan needs $1"
  else
    good "memory: $free MiB available of the $1 that the plan needs"
  fi
}

# engine NAME VERSION: the vllm on PATH (or in $VLLM) and, on Ascend, the plug-in are of the planned release.
engine() {
  local found python
  if ! have "${VLLM:-vllm}"; then
    note "engine: there is no vllm here; containers bring their own"
    return
  fi
  python=$(head -n 1 "$(command -v "${VLLM:-vllm}")" | sed -nE 's/^#! *(\/usr\/bin\/env +)?//p')
  found=$("${python:-python3}" - "$1" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import PackageNotFoundError, version
for name in (sys.argv[1], sys.argv[1].removesuffix("-cpu")):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
PYTHON
  )
  case $found in
    "$2" | "$2".* | "$2"[a-z]*) good "engine: $1 $found" ;;
    '') bad "engine: $1 is not installed beside $(command -v "${VLLM:-vllm}")" ;;
    *) if [ "$2" = main ]; then note "engine: $1 $found"; else bad "engine: $1 $found, the plan is for $2"; fi ;;
  esac
}

edges() { { head -c @EDGE@ "$1"; tail -c @EDGE@ "$1"; } | sha256sum | cut -d ' ' -f 1; }

# all_files PATH: size, hash and name of every file that belongs to a checkpoint.
all_files() {
  local file
  cd "$1" 2>/dev/null || return
  for file in *; do
    case $file in *.md | *.part | *.lock) continue ;; esac
    if [ -f "$file" ]; then echo "$(stat -Lc %s "$file") $(edges "$file") $file"; fi
  done
}

# checkpoint PATH LIST: every file is there, of the listed size and hash.
checkpoint() {
  local path=$1 list=$2 size quick whole name file found wrong=0 count=0
  if ! [ -e "$path" ]; then
    bad "checkpoint: $path is not there"
    return
  fi
  if [ -z "$list" ]; then
    found=$(all_files "$path" | sha256sum | cut -c 1-16)
    note "checkpoint: $path is there; it was not at hand when the plan was rendered. Compare on all nodes: $found"
    return
  fi
  while read -r size quick whole name; do
    case $size in '#'*) continue ;; esac
    file=$path
    if [ -d "$path" ]; then file=$path/$name; fi
    count=$((count + 1))
    if ! [ -f "$file" ]; then
      bad "checkpoint: $name is missing"
    elif [ "$(stat -Lc %s "$file")" != "$size" ]; then
      bad "checkpoint: $name has $(stat -Lc %s "$file") bytes, expected $size"
    elif [ "$(edges "$file")" != "$quick" ]; then
      bad "checkpoint: $name differs from the one that was planned for"
    elif [ "$full" = 1 ] && [ "$whole" != - ] && [ "$(sha256sum <"$file" | cut -d ' ' -f 1)" != "$whole" ]; then
      bad "checkpoint: $name differs in the middle (whole file compared)"
    else
      continue
    fi
    wrong=$((wrong + 1))
  done <"$list"
  [ "$wrong" -gt 0 ] || good "checkpoint: $count files as listed in $list"
}
