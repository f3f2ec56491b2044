# The one file a new cluster edits: the .sbatch files read it on the job's first node, in the folder that
# sbatch was called in, and what it exports reaches every node.
# shellcheck shell=bash disable=SC1091,SC2034  # its variables are for the scripts that read it

# Software: modules, then the environment that `make setup` has made.
# module load cuda/12.8
. .venv/bin/activate

# Or a container, which then holds the software: this prefix goes before every command. See docs/clusters.md.
container=()
# container=(apptainer exec --nv --bind "$PWD" babl.sif)

# The loop; an edited copy of it goes here, or on the command line: SCRIPT=mine.py sbatch launch/train.sbatch ...
script=${SCRIPT:-scripts/train.py}

# Processes on each node: one per GPU, or one where there is none.
processes=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=$((${SLURM_CPUS_ON_NODE:-1} / processes > 0 ? ${SLURM_CPUS_ON_NODE:-1} / processes : 1))
# Threads that wait sleep: spinning ones take the cores from others.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# The port at which the nodes meet on the first one: another for each job, and none that the system hands out itself
# (/proc/sys/net/ipv4/ip_local_port_range, mostly from 32768). Where it is taken, train.sbatch takes the next free one.
port=$((20000 + SLURM_JOB_ID % 10000))

# Seconds that the nodes wait for one another: images to pull, modules to load, a slow file system.
join_timeout=900

# The network, where the fast interface is not found: NCCL looks for InfiniBand first, and gloo takes the interface that
# leads to the first node's NodeAddr.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
