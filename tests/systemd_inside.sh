# Run by systemd_kit.py in a control group and a mount namespace of its own: what is mounted here ends with it.
# $1: a scratch folder, $2: the checkout, $3: the Python environment, $4: the Python installation.
set -eu
scratch=$1 checkout=$2 environment=$3 python=$4
mount --make-rprivate /
mount -t tmpfs tmpfs "$scratch"
mkdir -p "$scratch/etc/upper" "$scratch/etc/work" "$scratch/var/upper" "$scratch/var/work" "$scratch/checkout" \
  "$scratch/environment" "$scratch/python"
mount --bind "$checkout" "$scratch/checkout"
mount --bind "$environment" "$scratch/environment"
mount --bind "$python" "$scratch/python"
mount -t tmpfs tmpfs /opt
mkdir -p /opt/checkout /opt/python /opt/understudy/bin /opt/understudy/lib
mount --bind "$scratch/checkout" /opt/checkout
mount --bind "$scratch/python" /opt/python
mount --bind "$scratch/environment/lib" /opt/understudy/lib
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$scratch/etc/upper,workdir=$scratch/etc/work" /etc
mount -t overlay overlay -o "lowerdir=/var,upperdir=$scratch/var/upper,workdir=$scratch/var/work" /var
mount -t tmpfs tmpfs /home
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --make-rshared /

# The environment that an operator would make with venv and pip, over the interpreter that runs these tests.
name=$(basename "$(ls -d "$python"/lib/python3.1? | head -1)")
ln -s "/opt/python/bin/$name" /opt/understudy/bin/python
printf 'home = /opt/python/bin\ninclude-system-site-packages = false\n' > /opt/understudy/pyvenv.cfg
cat > /opt/understudy/bin/understudyd <<'SCRIPT'
#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/checkout/client:/opt/checkout/daemon
exec /opt/understudy/bin/python -m understudyd.main "$@"
SCRIPT
chmod +x /opt/understudy/bin/understudyd

# As docs/operations.md says; a user's manager looks for units in its runtime directory.
systemd-sysusers /opt/checkout/systemd/understudy.sysusers.conf
systemd-tmpfiles --create /opt/checkout/systemd/understudy.tmpfiles.conf
mkdir -p /run/systemd/system /run/systemd/user
cp /opt/checkout/systemd/understudyd.service /opt/checkout/systemd/understudyd@.service /run/systemd/user/

# Where a system's manager keeps the directories of services.
export XDG_RUNTIME_DIR=/run XDG_CONFIG_HOME=/var/lib XDG_STATE_HOME=/var/lib XDG_CACHE_HOME=/var/cache HOME=/home
export SYSTEMD_LOG_LEVEL=info
unset NOTIFY_SOCKET LISTEN_PID LISTEN_FDS LISTEN_FDNAMES
exec /lib/systemd/systemd --user --unit=basic.target
