(function () {
  var data = JSON.parse(document.getElementById('explored').textContent);
  var section = document.getElementById('map'), canvas = document.getElementById('canvas');
  var card = document.getElementById('card'), legend = document.getElementById('legend');
  var colour = document.getElementById('colour'), find = document.getElementById('find');
  var pictures = document.getElementById('as-pictures'), chosen = document.getElementById('chosen');
  var pen = canvas.getContext('2d'), count = data.names.length, tile = data.tile;
  var colours = ['#0072b2', '#e69f00', '#009e73', '#d55e00', '#cc79a7', '#56b4e9', '#b5a400', '#7b61c9', '#8c564b', '#3d9970',
    '#e377c2', '#17becf', '#bc5090', '#7f9f00', '#a06a2c', '#5f7fbf', '#c94f4f', '#4fb3a5', '#9c6fb0', '#d0a060'];
  var only = null, spot = -1, pinned = -1, kept = [], view = null, drag = null;
  section.hidden = false;

  var sheets = [];
  for (var start = 0; start < count; start += tile[3]) {
    var probe = document.createElement('span'), sheet = new Image();
    probe.className = 's' + sheets.length;
    document.body.appendChild(probe);
    sheet.onload = draw;
    sheet.src = getComputedStyle(probe).backgroundImage.replace(/^url\("?|"?\)$/g, '');
    probe.remove();
    sheets.push(sheet);
  }

  function where(k) {
    k %= tile[3];
    return [k % tile[2] * tile[0], Math.floor(k / tile[2]) * tile[1]];
  }
  function picture(k) {
    var made = document.createElement('span'), at = where(k);
    made.className = 'tile s' + Math.floor(k / tile[3]);
    made.style.cssText = 'width:' + tile[0] + 'px;height:' + tile[1] + 'px;background-position:-' + at[0] + 'px -' + at[1] + 'px';
    made.title = data.names[k];
    made.dataset.image = k;
    return made;
  }
  function value(name, k) {
    return name === 'oddness' ? data.oddness[k].toFixed(3) : data.columns[name].names[data.columns[name].codes[k]];
  }
  function said(k) {
    return Object.keys(data.columns).concat('oddness').map(function (name) { return name + ': ' + value(name, k); });
  }
  var ranks = data.oddness.slice().sort(function (a, b) { return a - b; });
  function shade(k) {
    if (colour.value !== 'oddness') return colours[data.columns[colour.value].codes[k]] || '#8a9099';
    var low = 0, high = count;
    while (low < high) { var half = (low + high) >> 1; if (ranks[half] < data.oddness[k]) low = half + 1; else high = half; }
    return 'hsl(' + (240 - 220 * low / count) + ' 80% 52%)';
  }
  function place(k) {
    return [(data.places[k][0] - view[0]) * view[2], (data.places[k][1] - view[1]) * view[2]];
  }
  function fit() {
    var box = canvas.getBoundingClientRect(), scale = window.devicePixelRatio || 1;
    canvas.width = box.width * scale;
    canvas.height = box.height * scale;
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    var right = 1, low = 1;
    data.places.forEach(function (at) { right = Math.max(right, at[0]); low = Math.max(low, at[1]); });
    var zoom = 0.94 * Math.min(box.width / right, box.height / low);
    view = [right / 2 - box.width / 2 / zoom, low / 2 - box.height / 2 / zoom, zoom];
  }
  function ring(k, radius) {
    var at = place(k);
    pen.beginPath();
    pen.arc(at[0], at[1], radius, 0, 7);
    pen.stroke();
  }
  function draw() {
    if (!view) return;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    var inside = new Set(kept), size = count > 2000 ? 2.5 : 4;
    for (var pass = 0; pass < 2; pass++) {
      for (var k = 0; k < count; k++) {
        if (inside.has(k) !== Boolean(pass)) continue;
        var at = place(k);
        pen.globalAlpha = pass ? 0.85 : 0.12;
        if (pictures.checked && pass) {
          var from = where(k), side = Math.max(count > 2000 ? 12 : 20, Math.min(tile[0], 900 * view[2]));
          pen.globalAlpha = 1;
          pen.drawImage(sheets[Math.floor(k / tile[3])], from[0], from[1], tile[0], tile[1],
            at[0] - side / 2, at[1] - side / 2, side, side * tile[1] / tile[0]);
        } else {
          pen.fillStyle = shade(k);
          pen.beginPath();
          pen.arc(at[0], at[1], size, 0, 7);
          pen.fill();
        }
      }
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = getComputedStyle(document.body).color;
    pen.lineWidth = 2;
    if (spot >= 0) ring(spot, 7);
    if (pinned >= 0) { ring(pinned, 9); data.near[pinned].forEach(function (k) { ring(k, 6); }); }
  }
  function filter() {
    var word = find.value.trim().toLowerCase();
    kept = [];
    for (var k = 0; k < count; k++) {
      var one = only === null || data.columns[colour.value].codes[k] === only;
      if (one && (!word || (data.names[k] + '\n' + said(k).join('\n')).toLowerCase().includes(word))) kept.push(k);
    }
    document.getElementById('count').textContent = kept.length + ' of ' + count + ' images';
    draw();
  }
  function names() {
    legend.textContent = '';
    only = null;
    if (colour.value === 'oddness') { legend.textContent = 'Blue: many images are like it. Red: odd.'; filter(); return; }
    var column = data.columns[colour.value], totals = column.names.map(function () { return 0; });
    column.codes.forEach(function (code) { totals[code]++; });
    column.names.forEach(function (name, code) {
      var line = document.createElement('button'), dot = document.createElement('i');
      line.type = 'button';
      dot.style.background = colours[code] || '#8a9099';
      line.append(dot, name + ' (' + totals[code] + ')');
      line.setAttribute('aria-pressed', 'false');
      line.addEventListener('click', function () {
        only = only === code ? null : code;
        legend.querySelectorAll('button').forEach(function (each, n) { each.setAttribute('aria-pressed', String(n === only)); });
        filter();
      });
      legend.append(line);
    });
    filter();
  }
  function row(list) {
    var made = document.createElement('div');
    made.className = 'tiles';
    list.forEach(function (k) {
      var figure = document.createElement('figure'), text = document.createElement('figcaption');
      text.textContent = data.columns.label ? value('label', k) : '';
      figure.append(picture(k), text);
      made.append(figure);
    });
    return made;
  }
  function pin(k) {
    pinned = k;
    chosen.textContent = '';
    var head = document.createElement('h3'), text = document.createElement('p');
    head.textContent = data.names[k];
    text.className = 'note';
    text.textContent = said(k).join(', ') + '. Itself, then its nearest neighbours:';
    chosen.append(head, text, row([k].concat(data.near[k])));
    draw();
  }
  function under(event) {
    var box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top, best = -1, least = 144;
    kept.forEach(function (k) {
      var at = place(k), far = (at[0] - x) * (at[0] - x) + (at[1] - y) * (at[1] - y);
      if (far < least) { least = far; best = k; }
    });
    return best;
  }
  function hover(event) {
    if (drag) {
      if (Math.abs(event.clientX - drag[0]) + Math.abs(event.clientY - drag[1]) > 4) drag[4] = true;
      view[0] = drag[2] - (event.clientX - drag[0]) / view[2];
      view[1] = drag[3] - (event.clientY - drag[1]) / view[2];
    }
    var k = drag && drag[4] ? -1 : under(event);
    card.hidden = k < 0;
    if (k >= 0 && k !== spot) {
      card.textContent = '';
      card.append(picture(k), data.names[k]);
      said(k).forEach(function (line) { card.append(document.createElement('br'), line); });
    }
    spot = k;
    if (k >= 0) {
      var at = place(k), box = canvas.getBoundingClientRect();
      card.style.left = Math.max(0, Math.min(at[0] + 12, box.width - card.offsetWidth)) + 'px';
      card.style.top = (at[1] > box.height / 2 ? at[1] - card.offsetHeight - 12 : at[1] + 12) + 'px';
    }
    draw();
  }
  canvas.addEventListener('pointermove', hover);
  canvas.addEventListener('pointerleave', function () { spot = -1; card.hidden = true; drag = null; draw(); });
  canvas.addEventListener('pointerdown', function (event) { drag = [event.clientX, event.clientY, view[0], view[1], false]; });
  canvas.addEventListener('pointerup', function (event) {
    var moved = drag && drag[4];
    drag = null;
    var k = under(event);
    if (!moved && k >= 0) pin(k);
  });
  canvas.addEventListener('wheel', function (event) {
    event.preventDefault();
    var box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    var by = Math.exp(-event.deltaY / 400);
    view[0] += x / view[2] * (1 - 1 / by);
    view[1] += y / view[2] * (1 - 1 / by);
    view[2] *= by;
    draw();
  }, { passive: false });
  document.addEventListener('click', function (event) {
    var image = event.target.dataset && event.target.dataset.image;
    if (image !== undefined) { pin(Number(image)); chosen.scrollIntoView({ block: 'center' }); }
  });
  document.addEventListener('keydown', function (event) {
    if (event.key === 'Enter' && event.target.dataset.image !== undefined) event.target.click();
  });
  document.getElementById('whole').addEventListener('click', function () { fit(); draw(); });
  document.getElementById('save').addEventListener('click', function () {
    var columns = ['path'].concat(Object.keys(data.columns), 'oddness');
    var lines = kept.map(function (k) {
      return columns.map(function (name) { return name === 'path' ? data.names[k] : value(name, k); });
    });
    var text = [columns].concat(lines).map(function (line) {
      return line.map(function (word) { return '"' + word.replace(/"/g, '""') + '"'; }).join(',');
    }).join('\r\n') + '\r\n';
    var link = document.createElement('a');
    link.href = 'data:text/csv;charset=utf-8,' + encodeURIComponent(text);
    link.download = 'images.csv';
    link.click();
  });
  find.addEventListener('input', filter);
  pictures.addEventListener('change', draw);
  colour.addEventListener('change', names);
  window.addEventListener('resize', function () { fit(); draw(); });
  if (data.columns.label) colour.value = 'label';
  fit();
  names();
})();
